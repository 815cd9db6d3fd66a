"""The seven domains of "MoE Lens" (arXiv 2603.05806) by their public datasets on the hub.

The authors released the texts that they used, not how they were drawn; what is here are the public datasets that they
name, or the nearest ones, so that numbers are comparable in kind. Nothing of them ships with the package.
"""

from dataclasses import dataclass

from moe_lens.data.corpus import Corpus, from_hub


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A dataset on the hub."""

    name: str
    hub: str
    config: str | None = None
    split: str
    revision: str
    """The commit that is read."""
    text: str
    source: str | None = None
    licence: str
    """What the dataset's card says; to be read there before anything is redistributed."""
    note: str
    """How it relates to what the authors used."""

    def open(self, revision: str | None = None) -> Corpus:
        """The texts, streamed; the hub is asked when they are read.

        Args:
            revision: Another commit than the one of the preset.
        """
        return from_hub(
            self.name,
            self.hub,
            config=self.config,
            split=self.split,
            revision=revision or self.revision,
            text=self.text,
            source=self.source,
            hint=f"licence: {self.licence}; another commit: {self.name}@COMMIT",
        )


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="paper/github",
            hub="allenai/paloma",
            config="dolma_100_programing_languages",
            split="val",
            revision="65cd6fc59dba021b21db414fa5e8d7765ffbe5e6",
            text="text",
            licence="AI2 ImpACT Low Risk, gated: its terms are to be accepted on the hub first",
            note="the subset of Paloma with code from GitHub, which the paper names",
        ),
        Preset(
            name="paper/english",
            hub="sedthh/gutenberg_english",
            split="train",
            revision="28973b04f28fd7be4a6186a042bc26159d4366ca",
            text="TEXT",
            licence="books in the public domain in the USA; see the card",
            note="English books of Project Gutenberg, a row a book; the paper names Gutenberg, not this copy",
        ),
        Preset(
            name="paper/french",
            hub="manu/fquad2_test",
            split="valid",
            revision="5384ce827bbc2156d46e6fcba83d75f8e6e1b4a6",
            text="context",
            source="title",
            licence="FQuAD: non-commercial research only, no redistribution",
            note="paragraphs of French Wikipedia in FQuAD 2; a paragraph comes once for each question about it",
        ),
        Preset(
            name="paper/aime",
            hub="di-zhang-fdu/AIME_1983_2024",
            split="train",
            revision="3e2cc86390666c5c756622afc0eeb9e6194496bc",
            text="Question",
            licence="MIT",
            note="problems of the AIME, 1983 to 2024; as the authors' file, without answers",
        ),
        Preset(
            name="paper/chinese",
            hub="opencsg/chinese-fineweb-edu",
            split="train",
            revision="5ea4039f50d246389cb188706055d7f9825f2b49",
            text="text",
            licence="Apache 2.0, and the terms of OpenCSG; see the card",
            note="Chinese FineWeb-Edu, which the paper names",
        ),
        Preset(
            name="paper/arxiv",
            hub="gfissore/arxiv-abstracts-2021",
            split="train",
            revision="e4c5fbd4dec8e46a5dc869216fe1c94cc585757a",
            text="title+abstract",
            licence="CC0 1.0 (arXiv's metadata)",
            note="titles and abstracts, as the authors' file has them; the paper does not say from which copy",
        ),
        Preset(
            name="paper/gsm8k",
            hub="openai/gsm8k",
            config="main",
            split="test",
            revision="e53f048856ff4f594e959d75785d2c2d37b678ee",
            text="question+answer",
            licence="MIT",
            note="questions with their answers, as in the authors' file",
        ),
    )
}
"""By name, as `--domain` takes them."""
