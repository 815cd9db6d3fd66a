"""Where hook points fire: routers, experts and layers, and the bridge that runs a model with them."""
