"""Names: what stands out at a concept's strongest positions and what it promotes, or what the user's file says."""

import json

import numpy as np
import pytest

from megacocomix.data.tokenizer import load_tokenizer
from megacocomix.errors import UserError
from megacocomix.interpret.concepts import Promoted, kept_pairs
from megacocomix.interpret.names import LONGEST_NAME, UNNAMED, Spelling, name_concepts, read_names, readable
from megacocomix.interpret.reading import Reading, Windows


@pytest.fixture(scope="module")
def spelling():
    return Spelling(load_tokenizer("gpt2"))


def ids(spelling, *texts):
    """Of texts that are one token each."""
    found = spelling.tokenizer.encode_batch(list(texts))
    assert all(len(each) == 1 for each in found)
    return [each[0] for each in found]


def reading(tokens, concepts):
    """A window of these tokens, at each of which one concept is kept."""
    num = len(tokens)
    tokens, places = np.array(tokens), np.arange(num)
    index, value = np.array(concepts)[:, None], np.ones((num, 1), np.float32)
    windows = Windows(["t"], [tokens], [0], [])
    slots = np.ones(num, bool)
    return Reading(windows, tokens, 0 * places, places, slots, 1, index, value, None, None, None, None, None)


def promoted(*rows):
    top = np.array(rows)
    return Promoted(top, 0.0 * top, top, 0.0 * top)


def names(spelling, tokens, concepts, promotes, listed):
    read = reading(tokens, concepts)
    return name_concepts(read, kept_pairs(read), promotes and promoted(*promotes), listed, spelling)


def test_a_name_has_the_tokens_that_stand_out_and_those_promoted(spelling):
    of, the, cat, dog = ids(spelling, " of", " the", " cat", " dog")
    tokens = [of, of, the, the, cat, dog] * 4
    concepts = [1, 1, 1, 2, 2, 2] * 4
    # 1 stands at " of" eight times, and at " the" as often as the text would have it: 4 of 12 are 8 of 24.
    assert names(spelling, tokens, concepts, [[cat, dog]], [1]) == ["on ‘of’ → ‘cat, dog’"]
    assert names(spelling, tokens, concepts, None, [1]) == ["on ‘of’"]
    assert names(spelling, tokens, concepts, [[dog, cat]], [7]) == ["→ ‘dog, cat’"]
    assert names(spelling, tokens, concepts, None, [7]) == [UNNAMED]


def test_upper_and_lower_case_are_one_word(spelling):
    lower, upper, plain, other = ids(spelling, " the", " The", "the", " cat")
    tokens, concepts = [lower, upper, plain, other, other, other], [0, 0, 0, 1, 1, 1]
    assert names(spelling, tokens, concepts, [[upper, plain, other]], [0]) == ["on ‘the’ → ‘The, cat’"]


def test_a_word_met_once_among_many_says_nothing(spelling):
    a, b, c = ids(spelling, " cat", " dog", " of")
    assert names(spelling, [a, a, a, b, c, c], [0, 0, 0, 0, 1, 1], None, [0]) == ["on ‘cat’"]


def test_only_the_strongest_positions_name_a_concept(spelling):
    cat, dog = ids(spelling, " cat", " dog")
    read = reading([cat] * 64 + [dog] * 200, [0] * 264)
    read.value[:64] = 2.0
    assert name_concepts(read, kept_pairs(read), None, [0], spelling) == ["on ‘cat’"]


def test_a_name_is_short_whatever_the_tokens(spelling):
    long = ids(spelling, " responsibilities", " characterization", " telecommunications", " unconstitutional")
    (name,) = names(spelling, long[:3] * 3 + [11], [0] * 9 + [1], [long], [0])
    assert 20 < len(name) <= LONGEST_NAME and "on ‘" in name and "→ ‘" in name


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" the", "the"),
        ("\n", "⏎"),
        ("\n\n", "⏎⏎"),
        (" ", "·"),
        ("   ", "···"),
        ("\t", "⇥"),
        ("\x00", "·"),
        (" a b", "a b"),
        (",", "comma"),
        (" é", "é"),
        ("", ""),
    ],
)
def test_what_cannot_be_seen_is_a_sign(text, shown):
    assert readable(text) == shown


def test_a_token_is_spelled_as_inside_a_sentence(spelling, root):
    assert spelling(ids(spelling, " the")[0]) == " the"
    assert spelling(spelling.tokenizer.eot_id) == "<|endoftext|>"
    half = spelling.tokenizer.encode_batch(["😀"])[0][0]
    assert spelling(half) == "‹byte›"
    sentencepiece = Spelling(load_tokenizer(root / "assets/teacher/tokenizer.model"))
    (token,) = sentencepiece.tokenizer.encode_batch([" the"])[0][-1:]
    assert sentencepiece(token) == " the" and sentencepiece(sentencepiece.tokenizer.eot_id) == "<|endoftext|>"


def test_parts_of_characters_are_not_in_a_name(spelling):
    half = spelling.tokenizer.encode_batch(["😀"])[0][0]
    (cat,) = ids(spelling, " cat")
    assert names(spelling, [cat], [0], [[half, cat]], [3]) == ["→ ‘cat’"]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("n.yaml", "12: website\n0: 'on'\n"),
        ("n.json", '{"12": " website ", "0": "on"}'),
        ("n.txt", '{12: website, "0": "on"}'),
    ],
)
def test_a_file_of_names(tmp_path, file, text):
    (tmp_path / file).write_text(text)
    assert read_names(tmp_path / file, 13) == {12: "website", 0: "on"}


@pytest.mark.parametrize(
    ("file", "text", "what"),
    [
        ("n.yaml", "13: website", "13 is no concept. Valid: 0 … 12"),
        ("n.yaml", "-1: website", "-1 is no concept"),
        ("n.yaml", "true: website", "True is no concept"),
        ("n.yaml", "word: website", "'word' is no concept"),
        ("n.yaml", "5: true", "the name of 5 is True"),
        ("n.yaml", "5: ''", "the name of 5 is ''"),
        ("n.yaml", "5: [a]", "the name of 5 is ['a']"),
        ("n.yaml", "5: a\n5: b", "given twice"),
        ("n.yaml", "5: [", "not valid YAML"),
        ("n.yaml", "", "holds no names"),
        ("n.json", "[1]", "holds no names"),
        ("n.json", '{"5": }', "line 1 is not JSON"),
        ("n.json", json.dumps({"5": 3}), "the name of 5 is 3"),
    ],
)
def test_a_mistake_in_a_file_of_names_names_the_file(tmp_path, file, text, what):
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError) as caught:
        read_names(tmp_path / file, 13)
    assert all(str(tmp_path / file) in problem for problem in caught.value.problems)
    assert what in caught.value.problems[0]


def test_all_mistakes_of_a_file_are_said_at_once(tmp_path):
    (tmp_path / "n.yaml").write_text("99: a\n1: 2\n0: fine\n")
    with pytest.raises(UserError) as caught:
        read_names(tmp_path / "n.yaml", 13)
    assert len(caught.value.problems) == 2
