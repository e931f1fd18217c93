"""Training of the needle checkpoint: its documents and its curriculum."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from workers.training import needle
from workers.training.data import Corpus, Curriculum, DocumentMaker, collate, load_corpus

ASSETS = needle.ASSETS


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer, words and a twentieth of the book."""
    directory = tmp_path_factory.mktemp("assets")
    for name in ("tokenizer.json", "words.json"):
        shutil.copyfile(ASSETS / name, directory / name)
    with gzip.open(ASSETS / "book.txt.gz", "rt") as book, gzip.open(directory / "book.txt.gz", "wt") as short:
        short.write(book.read(200_000))
    return directory


@pytest.fixture(scope="module")
def corpus(assets: Path) -> Corpus:
    return load_corpus(assets)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(ASSETS / "tokenizer.json"))


def maker(corpus: Corpus, seed: int = 0) -> DocumentMaker:
    return DocumentMaker(corpus, np.random.default_rng(seed))


class TestDocuments:
    @pytest.mark.parametrize(
        ("length", "shortest"),
        [(64, True), (65, True), (127, True), (256, True), (128, False), (129, False), (512, False), (1031, False)],
    )
    def test_every_draw_has_the_length_asked_for(self, corpus: Corpus, length: int, shortest: bool) -> None:
        source = maker(corpus)
        for _ in range(30):
            document = source.draw(length, shortest)
            assert len(document.tokens) == length
            assert document.answers
            assert all(0 < position < length for position in document.answers)
            assert min(document.tokens) >= 0
            assert max(document.tokens) < corpus.vocab

    def test_haystack_reads_as_the_prompt_of_the_readme(self, corpus: Corpus, tokenizer: Tokenizer) -> None:
        document = maker(corpus, 3).haystack(400, needles=5, questions=3)
        text = tokenizer.decode(document.tokens, skip_special_tokens=False)
        body, *asked = text.split("\nQuestion: What is the secret code of ")
        assert len(asked) == 3
        assert body.count("\nThe secret code of ") == 5
        for part in asked:
            subject, answer = part.split("?\nAnswer:")
            statement = answer.removesuffix("<|endoftext|>")
            assert answer != statement
            assert statement.startswith(f" The secret code of {subject} is ")
            assert f"\n{statement.strip()}\n" in body
        assert len(document.answers) == 3 * 15
        firsts = [p for p, (_, first) in document.answers.items() if first]
        assert [document.answers[p][0] for p in firsts] == [5.0] * 3
        assert all(document.tokens[p] in corpus.digits for p in firsts)
        assert all(tokenizer.id_to_token(document.tokens[p - 1]) == "Ġ" for p in firsts)

    def test_joined_pieces_are_what_the_tokenizer_gives(self, corpus: Corpus, tokenizer: Tokenizer) -> None:
        source = maker(corpus)
        for code in source.codes(20):
            tokens = corpus.needle(code) + corpus.question(code) + corpus.answer(code)
            assert tokenizer.encode(tokenizer.decode(tokens, skip_special_tokens=False)).ids == tokens

    def test_restated_lines_repeat_their_code(self, corpus: Corpus, tokenizer: Tokenizer) -> None:
        source = maker(corpus, 1)
        for _ in range(10):
            document = source.dense(256)
            text = tokenizer.decode(document.tokens)
            for position, (_, first) in document.answers.items():
                if first:
                    code = tokenizer.decode(document.tokens[position : position + 5])
                    assert text.count(f" is {code}.") >= 2

    def test_repeated_answers_are_copies(self, corpus: Corpus) -> None:
        document = maker(corpus).repeated(257)
        assert document.tokens[129:] == document.tokens[:128]
        assert len(document.answers) == 64
        assert min(document.answers) > 129

    @pytest.mark.parametrize("count", [1, 2, 24, 127])
    def test_codes_never_share_both_words(self, corpus: Corpus, count: int) -> None:
        codes = maker(corpus).codes(count)
        assert len({code[:2] for code in codes}) == count

    def test_words_are_shared_about_as_often_as_told(self, corpus: Corpus) -> None:
        source = maker(corpus)
        pairs = [source.codes(2) for _ in range(400)]
        shared = sum(one[0] == other[0] or one[1] == other[1] for one, other in pairs)
        assert 0.22 < shared / 400 < 0.40

    def test_collate_points_at_the_row_before(self, corpus: Corpus) -> None:
        batch = collate([maker(corpus, seed).haystack(128, 2, 1) for seed in range(3)])
        assert batch.tokens.shape == (3, 128)
        assert torch.equal(batch.tokens.flatten()[batch.rows + 1], batch.targets)
        assert int(batch.first.sum()) == 3
        assert torch.equal(batch.weights[batch.first], torch.full((3,), 5.0))

    def test_a_word_of_two_tokens_is_refused(self, assets: Path, tmp_path: Path) -> None:
        copy = tmp_path / "assets"
        shutil.copytree(assets, copy)
        (copy / "words.json").write_text('{"adjectives": ["xylographic"], "nouns": ["bell"]}')
        with pytest.raises(ValueError, match=r"' xylographic' is \d tokens"):
            load_corpus(copy)


class TestCurriculum:
    @pytest.mark.parametrize(("limit", "lengths"), [(64, [64]), (256, [256]), (511, [256]), (1024, [256, 512, 1024])])
    def test_lengths_end_at_the_limit(self, limit: int, lengths: list[int]) -> None:
        assert Curriculum(limit).lengths == lengths

    @pytest.mark.parametrize(
        ("steps", "right", "stage"),
        [(1, 100, 0), (59, 100, 0), (60, 100, 1), (200, 95, 0), (60, 96, 1), (119, 100, 1), (120, 100, 2)],
    )
    def test_next_length_needs_steps_and_accuracy(self, steps: int, right: int, stage: int) -> None:
        curriculum = Curriculum(1024)
        for _ in range(steps):
            curriculum.record(curriculum.lengths[curriculum.stage], right, 100)
        assert curriculum.stage == stage

    def test_shorter_lengths_do_not_count_but_are_picked(self) -> None:
        curriculum = Curriculum(512)
        curriculum.stage = 1
        for _ in range(100):
            curriculum.record(256, 10, 10)
        assert curriculum.accuracy == 0.0
        rng = np.random.default_rng(0)
        picks = [curriculum.pick(rng) for _ in range(500)]
        assert 0.5 < picks.count(512) / 500 < 0.7

    def test_state_survives(self) -> None:
        curriculum, other = Curriculum(512), Curriculum(512)
        for _ in range(70):
            curriculum.record(256, 9, 9)
        curriculum.record(512, 3, 4)
        other.restore(json.loads(json.dumps(curriculum.state())))
        assert other.state() == curriculum.state()
        assert (other.stage, other.accuracy) == (1, 0.75)
