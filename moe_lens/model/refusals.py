"""Model types with experts that are refused, and why: what a hook would show there would not be true."""

REFUSED = {
    "zaya": "its router has a class that skips the experts and hands a state from layer to layer, for which the hook "
    "table has no place",
}
