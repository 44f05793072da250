import pytest

from movd.captions import clean_caption, lost, official_prompt


@pytest.mark.parametrize(
    ("given", "cleaned"),
    [
        ("A Red Circle", "a red circle"),
        ("  a   cat\n and a\tdog ", "a cat and a dog"),
        ("see https://example.com/cats?x=1 now", "see ?x=1 now"),
        ("buy at shop.example.com/cats today", "buy at today"),
        ("<b>bold</b> move<!-- hidden --> on", "bold move on"),
        ("<style>p{color:red}</style>a cat", "a cat"),
        ("fish &amp; chips &lt;3", "fish chips <3"),
        ("fish &amp;amp; chips", "fish ; chips"),  # as the original leaves it
        ("a cat by @painter99", "a cat by"),
        ("一只猫 a cat", "a cat"),
        ("well—known – dashes", "well-known - dashes"),
        ("“quoted” and ‘this’", "quoted\" and 'this"),
        ("host 192.168.0.1 down", "host down"),
        ("number #123 and 1234567 and #99999", "number and and"),
        ("photo cat_01.jpg of a cat", "photo of a cat"),
        ("wait... what", "wait what"),
        ("***wow*** (really) [yes] {no}", "wow really yes no"),
        ("this-is-my-cute-cat", "this is my cute cat"),
        ("a well-known cat", "a well-known cat"),
        ("schÃ¶n", "schã¶n"),
        ("lamp jc6640 and jc6640vc and 6640vc231", "lamp and and"),
        ("free shipping worldwide free shipping", ""),
        ("poster 30x40 on page 7", "poster on"),
        ("click for more cats", "cats"),
        ("a cat,a dog", "a cat, a dog"),
        ('"a cat"', "a cat"),
        (".hidden", ""),
        ("a+b%20c", "a b c"),
        ("a happy cat 😀", "a happy cat 😀"),
        ("", ""),
        ("<person> walks", "person walks"),
    ],
)
def test_a_caption_is_cleaned_as_in_training(given, cleaned):
    assert clean_caption(given) == cleaned


def test_a_prompt_is_scored_and_cleaned_twice():
    assert official_prompt("A Cat") == "a cat aesthetic score: 6.5."
    assert official_prompt("A Cat", aesthetic=None) == "a cat"
    assert official_prompt("a cat aesthetic score: 5.0.") == "a cat aesthetic score: 5.0."
    assert clean_caption("_-cat") == "-cat"
    assert official_prompt("_-cat", None) == "cat"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("A red Circle", []),
        ("“quoted” and ‘this’ — well—known, a+b%20c <b>bold</b> 😀 fish &amp; chips", []),
        ("", []),
        ("一只红色的狐狸", ["一只红色的狐狸"]),
        ("a fox, 狐狸, runs", ["狐狸"]),
        ("photo cat_01.jpg by @painter99", ["cat", "01", "jpg", "painter99"]),
        ("see shop.example.com/cats now, now", ["shop", "example", "com", "cats"]),
        ("free shipping of lamp jc6640", ["free", "shipping", "jc6640"]),
    ],
)
def test_what_cleaning_leaves_out_of_a_prompt_is_known_by_word(prompt, words):
    assert lost(prompt, official_prompt(prompt)) == words
