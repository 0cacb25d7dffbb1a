"""A plugged-in recogniser: what it finds goes, its failure is no silence, and nothing is fetched."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from client.data.cli import app
from client.data.deidentify import scrub
from client.data.leak_gate import measure_leaks
from client.data.recogniser import identifying_spans, load_recogniser, recogniser_identity
from client.data.store import read_pairs
from common.errors import RecogniserInvalid
from tests.client.data.site_folder import make_site, rows
from tests.client.data.test_hostile import command
from tests.client.data.test_import_table import run_import

HERE = "tests.client.data.name_list"
REPORTS = [f"The lungs are clear. Heart size is normal. A nodule of {n} mm is seen." for n in range(40)]


def test_found_names_go_and_harmless_labels_stay() -> None:
    recognise = load_recogniser(f"{HERE}:find_names")
    text = "Told Jane Ellsworth about it. Nodule of 8 mm."
    assert scrub(text).text == text
    scrubbed = scrub(text, recognise=recognise)
    assert scrubbed.text == "Told ___ about it. Nodule of 8 mm."
    assert scrubbed.replaced == {"recogniser": 1}
    assert scrub(scrubbed.text, recognise=recognise).text == scrubbed.text


def test_part_of_a_word_takes_the_whole_word() -> None:
    assert scrub("As Ellsworth said.", recognise=load_recogniser(f"{HERE}:find_half")).text == "As ___ said."


def test_leak_gate_measures_what_the_recogniser_adds() -> None:
    without = measure_leaks(REPORTS, seed=3)
    with_it = measure_leaks(REPORTS, seed=3, recognise=load_recogniser(f"{HERE}:find_names"))
    assert without.uncued_planted == with_it.uncued_planted == 40
    assert without.uncued_recall < 0.1
    assert with_it.uncued_recall == 1
    assert (with_it.known_recall, with_it.free_recall) == (without.known_recall, without.free_recall)


@pytest.mark.parametrize("name", ["fail", "beyond"])
def test_recogniser_that_fails_is_an_error_without_the_text(name: str) -> None:
    with pytest.raises(RecogniserInvalid) as caught:
        identifying_spans(load_recogniser(f"{HERE}:{name}"), "Jane was here.")
    assert "Jane" not in str(caught.value)


@pytest.mark.parametrize(
    "spec", ["no.such.module:f", f"{HERE}:nothing", "/no/such/folder", "dslim/bert-base-NER"]
)
def test_recogniser_that_is_not_here_is_refused(spec: str) -> None:
    with pytest.raises(RecogniserInvalid):
        load_recogniser(spec)
    with pytest.raises(RecogniserInvalid):
        recogniser_identity(spec.replace(f"{HERE}:nothing", "no.such:f"))


def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecogniserInvalid, match="found neither"):
        load_recogniser(str(tmp_path))
    (tmp_path / "meta.json").write_text("{}")
    with pytest.raises(RecogniserInvalid, match="spaCy"):
        load_recogniser(str(tmp_path))


def test_import_uses_the_recogniser_and_names_it_on_the_card(tmp_path: Path) -> None:
    table = rows(3)
    table[0]["findings"] = "Heart size is normal. Told Jane Ellsworth about it."
    source = make_site(tmp_path / "hospital", table)
    run_import(source, tmp_path / "out", "--ner", f"{HERE}:find_names", "--workers", "2")
    assert any("Told ___ about it." in pair.findings for pair in read_pairs(tmp_path / "out"))
    card = json.loads((tmp_path / "out/card.json").read_text())
    assert card["import"]["recogniser"] == recogniser_identity(f"{HERE}:find_names")
    assert card["leak_gate"]["uncued_recall"] == 1


def test_failing_recogniser_quarantines_every_study(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    source = make_site(tmp_path / "hospital", rows(2))
    options = ["--dry-run", "--no-check-writing", "--workers", "1", "--json", "--ner", f"{HERE}:fail"]
    result = CliRunner().invoke(app, ["import", str(source), "--out", str(tmp_path / "out"), *options])
    assert json.loads(result.stdout)["dropped"] == {"quarantine-recogniser-failed": 2}


def tiny_model(folder: Path) -> None:
    """Train a token classifier from nothing, in a second: capitalised words it knows are names."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertForTokenClassification, PreTrainedTokenizerFast

    words = "[PAD] [UNK] [CLS] [SEP] told about it the lungs are clear heart jane ellsworth ##worth ells . ,"
    vocabulary = {word: number for number, word in enumerate(words.split())}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special: dict[str, Any] = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, sep_token="[SEP]", **special)
    torch.manual_seed(1)
    labels = {0: "O", 1: "B-PATIENT"}
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        id2label=labels,
        label2id={name: number for number, name in labels.items()},
    )
    model = BertForTokenClassification(config)
    names = {vocabulary[word] for word in ("jane", "ellsworth", "ells", "##worth")}
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        tokens = torch.randint(0, len(vocabulary), (16, 12))
        truth = torch.tensor([[int(int(token) in names) for token in row] for row in tokens])
        loss = model(input_ids=tokens, labels=truth).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder, safe_serialization=True)
    fast.save_pretrained(folder)


@pytest.mark.filterwarnings("ignore")
def test_folder_with_a_token_classifier_is_used(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    recognise = load_recogniser(str(tmp_path / "model"))
    assert scrub("The lungs are clear. Told Jane Ellsworth about it.", recognise=recognise).text == (
        "The lungs are clear. Told ___ about it."
    )
    long = "The lungs are clear. " * 200 + "Told Jane about it."
    assert "Jane" not in scrub(long, recognise=recognise).text
    before = recogniser_identity(str(tmp_path / "model"))
    assert before["name"] == "model"
    (tmp_path / "model/config.json").write_text((tmp_path / "model/config.json").read_text() + "\n")
    assert recogniser_identity(str(tmp_path / "model")) != before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_model_folder_opens_no_socket(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    source = make_site(tmp_path / "hospital", rows(3))
    watch = (
        "import os, sys\n"
        "def hook(event, arguments):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.bind'):\n"
        "        sys.stderr.write(f'SOCKET {event}\\n'); sys.stderr.flush(); os._exit(99)\n"
        "sys.addaudithook(hook)\n"
        "from client.data.cli import main\n"
        "sys.argv = sys.argv[1:]\n"
        "main()\n"
    )
    arguments = command(source, tmp_path / "out", "--ner", str(tmp_path / "model"))[3:]
    done = subprocess.run([sys.executable, "-c", watch, "data", *arguments], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert len(read_pairs(tmp_path / "out")) == 3


@pytest.mark.filterwarnings("ignore")
def test_spacy_pipeline_in_a_folder_is_used(tmp_path: Path) -> None:
    spacy = pytest.importorskip("spacy")
    pipeline = spacy.blank("en")
    pipeline.add_pipe("entity_ruler").add_patterns([{"label": "PERSON", "pattern": "Jane Ellsworth"}])
    pipeline.to_disk(tmp_path / "model")
    recognise = load_recogniser(str(tmp_path / "model"))
    assert scrub("Told Jane Ellsworth about it.", recognise=recognise).text == "Told ___ about it."
