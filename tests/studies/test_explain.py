"""What explains a choice: the planted model is recovered, tables of one's own meet their tokens, and the page runs."""

import os
from typing import Any

import pandas as pd
import pytest

from moe_lens.cli import main
from moe_lens.errors import InputError
from moe_lens.studies import Explain, StudyResult, collect, read_features, run
from tests.planted import ATLAS_READING, LAYER, PLANTED, WORDS, planted_domains, planted_model
from tests.studies.tiny import save_checkpoint, write_jsonl


@pytest.fixture(scope="module")
def model() -> Any:
    return planted_model()


@pytest.fixture(scope="module")
def features(model, tmp_path_factory) -> pd.DataFrame:
    """A label that is the domain's in half of the tokens, and a number that says nothing."""
    folder = tmp_path_factory.mktemp("collected") / "c"
    found = collect(model, planted_domains(), reading=ATLAS_READING, out=folder)
    frames = []
    for domain in ("sea", "law", "art"):
        for shard in found.shards(domain):
            frame = pd.DataFrame({name: shard[name].numpy() for name in ("token", "document", "position", "counted")})
            frames.append(frame.assign(domain=domain))
    frame = pd.concat(frames, ignore_index=True)
    label = frame["domain"].where(frame["position"] % 2 == 0, "none")
    return frame.assign(label=label, noise=(frame.index * 7919 % 101) / 101)


@pytest.fixture(scope="module")
def found(model, features) -> StudyResult:
    return run(Explain(features), model, planted_domains(), reading=ATLAS_READING)


@pytest.mark.typed
def test_the_planted_experts_are_chosen_for_their_words_and_nothing_else(found):
    experts: Any = found.tables["experts"].query(f"layer == {LAYER}").set_index(["expert", "feature"])
    said: Any = found.tables["chosen_for"].query(f"layer == {LAYER}").set_index("expert")
    for domain, expert in PLANTED.items():
        token = experts.loc[expert, "token"]
        assert token["auc_low"] > 0.99 and token["explained"] > 0.95 and token["recall"] > 0.95
        assert experts.loc[(expert, "label"), "auc"] > 0.6
        for feature in ("previous", "position", "domain", "label", "numbers", "all"):
            assert experts.loc[(expert, feature), "gain"] < 0.05, "nothing is left to explain"
        assert said["precision"][expert] > 0.95 and said["recall"][expert] > 0.9
        own, others = said["sentence"][expert], [name for name in WORDS if name != domain]
        assert f"{domain} texts" in own or any(word[:3] in own for word in WORDS[domain])
        assert not any(f"{name} texts" in own for name in others)


@pytest.mark.typed
def test_tables_that_do_not_fit_the_texts_are_refused(model, features, tmp_path):
    def refused(frame: pd.DataFrame) -> str:
        with pytest.raises(InputError) as error:
            run(Explain(frame), model, planted_domains(), reading=ATLAS_READING)
        return str(error.value)

    assert "lack 1 of" in refused(features.drop(features.index[features["position"] == 3][0]))
    assert "several rows" in refused(pd.concat([features, features.iloc[[5]]]))
    assert "are of other texts: they have token" in refused(features.assign(token=features["token"].to_numpy()[::-1]))
    assert "there is no column domain" in refused(features.drop(columns="domain"))
    once = features[features["counted"]].drop_duplicates(["document", "position"])
    assert "lack a column domain" in refused(once.drop(columns="domain"))
    assert "column token holds nan; expected whole" in refused(features.assign(token=float("nan")))
    assert "they have token" in refused(features.assign(token=features["token"] + 7.0))
    assert "'noise' has values that are missing" in refused(features.assign(noise=float("nan")))
    assert "columns document and position" in refused(features[["token", "label"]])
    assert "'noise' reaches 1e+30; at most" in refused(features.assign(noise=1e30))
    assert "'noise' holds a list; expected texts or numbers" in refused(features.assign(noise=[[1, 2]] * len(features)))
    assert "column counted holds ['no'" in refused(features.assign(counted="no"))
    assert "two columns are called 'noise'" in refused(
        features.set_axis([*features.columns[:-2], "noise", "noise"], axis=1)
    )
    (tmp_path / "twice.csv").write_text("document,position,x,position\n0,0,1,2\n")
    with pytest.raises(InputError, match=r"twice.csv: two columns are called 'position'"):
        read_features(tmp_path / "twice.csv")
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(InputError, match="a pipe or a device"):
        read_features(tmp_path / "pipe.csv")
    with pytest.raises(InputError, match="lack 1 of"):
        few = features.drop(features.index[features["position"] == 3][0])
        run(Explain(few), model, planted_domains(), reading=ATLAS_READING, out=tmp_path / "out")
    assert not list(tmp_path.glob("out*")), "no other table can go on from there"
    path = tmp_path / "t.parquet"
    features.to_parquet(path)
    assert read_features(path).equals(features)
    for name, says in (("t.txt", "parquet or .csv"), ("none.csv", "cannot be read"), ("bad.parquet", "is no table")):
        (tmp_path / "bad.parquet").write_text("x")
        with pytest.raises(InputError, match=says):
            read_features(tmp_path / name)


@pytest.mark.typed
def test_the_command_and_its_refusals(tmp_path, capsys):
    save_checkpoint(tmp_path / "model")
    write_jsonl(tmp_path / "a.jsonl", n=6, sources=6)
    write_jsonl(tmp_path / "b.jsonl", n=2, sources=2)
    command = ["explain", "--model", f"{tmp_path}/model", "--tokens", "200", "--window", "24"]
    assert main([*command, "--domain", f"a={tmp_path}/a.jsonl", "--out", f"{tmp_path}/one"]) == 0
    tables = StudyResult.load(tmp_path / "one").tables
    assert set(tables) == {"experts", "layers", "chosen_for"}
    assert set(tables["layers"]["feature"]) == {"token", "previous", "position", "all"}, "one domain says nothing"
    capsys.readouterr()
    assert main([*command, "--domain", f"b={tmp_path}/b.jsonl", "--out", f"{tmp_path}/two"]) == 2
    assert "three are needed" in capsys.readouterr().err
    assert main([*command, "--features", f"{tmp_path}/a.jsonl", "--out", f"{tmp_path}/two"]) == 2
