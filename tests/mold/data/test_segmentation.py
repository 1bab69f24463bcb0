"""Steps, key words and token spans: tables of messy text, properties, and tokenizers trained here."""
# ruff: noqa: RUF001 - the look-alike signs below are the ones that texts hold

import time
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from mold.data.segmentation import (
    SegmentOptions,
    Segments,
    find_keywords,
    find_numbers,
    segment,
    split_sentences,
    token_spans,
)


def pieces(text, spans):
    return [text[start:end] for start, end in spans]


# --- sentences ---

SENTENCES = [
    "He has 5 apples.|Is it 5?|Yes!",
    "It costs $3.50.|He pays 1,200.75 dollars.",
    "Natalia sold 48/2 = 24.|Then she sold 48+24 = 72.",
    "no final period",
    "One line\n|another line\n\n|x = 40\n|done",
    "Windows line.\r\n|Next line",
    "What?!|Really...|Yes…|so it is",
    "Mr. Smith met Mrs. Jones, Ms. Lee and Dr. No on St. Mary's day.|He left.",
    "Paris vs. London, e.g. by train, i.e. slowly.|Good.",
    "Pens, books, etc. are sold.|Pens, books, etc.|They are sold.",
    "From 8 a.m. to 5 p.m. on Monday.|It closes at 6 p.m.|Then he left at 7 P.M. sharp.",
    "The U.S. economy and the U.S. Army.|He lives in the U.S.|He works.",
    "No. 5 is red.|Is it red?|No.|It is not.",
    "It weighs approx. 5 lb. and 3 oz. of it is fat.|It is 6 ft. 2 in tall, 80 sq. ft. or 90 sq.ft. wide.",
    "He ran for 10 min. without rest.|He ran for 10 min.|Then he slept.",
    "A 5 oz. bag, a 5oz. bag.|It is 5 oz.|Tom buys it.",
    "J. Smith and George W. Bush met J. K. Rowling.|Mary B. Smith came.",
    "The answer is A.|This is right.|Of A and B.|Tom chose.|She has tree B.|Tree A gives more.",
    "It is December 31st.|If so, he is 3rd.",
    "She has a Ph.D. in maths.|He has a Ph.D.|Tom has none.",
    "1. Take 5.|Go.\n|2) Then rest.\n|a. First.\n|(b) Second.\n|- Third.\n|* Fourth.\n|• Fifth.",
    "Step 1: Add 5.|Add 6.\n|**Step 2:** Stop.\n|## Step 3. Rest.\n|**4.** Sleep.\n|Step 5\n|Then rest.",
    "24.\n|The answer",
    'He said "Go."|Then he left (at 5.)|She stayed.|(Yes.)|**So.**|Done.',
    '"Is it 5?" she asked.|"Wow!", he said.|The word "master." is long.',
    "So 46 + ... + 46 = 92.|3 + ? = 19.|It is 100 ft. = 30 m long.",
    "这是五。|那是5个苹果！|“好。”|完",
    "Visit www.x.com/a.b now.|Version 2.0 is out.",
    "Stop.\n)\n|Go .\n---\n|End",
    "... !\nStart.|End.",
    "?!",
]


ABBREVIATIONS = [
    "A cup costs Rs. 20 and a plate Rs. 1,200.|Both cost kr. 90 or 15 Rs. per box.|He has 90 Rs.|He pays.",
    "See p. 5, pp. 6-7, no. 3, ch. 2, sec. 4, vol. 3, eq. (5) and Eq. \\ref{a}.|Also Fig. A and Vol. II of it.|Go.",
    "The no. of pens is 5.|I said no.|He left.|No. 5 is red.",
    "Kim et al. found 5, Roe et al. [7] found 6.|It was shown by Kim et al.|Then he left.",
    "Gov. Brown, Sen. Ray, Lt. Col. Lee and sgt. york came.|He is a Sgt.|He has 5 men.|10 reps.|Then a rest.",
    "Mt. Fuji and Ft. Worth are far.|It is 100 ft.|Tom is 6 ft. tall.",
    "Wong Bros. made 5.|Wong Bros. Toys made 6.|He saw the Bros.|Then he left.",
    "It is 5 in. long, 3 cm. wide, 2 m. high and 30 sq. in. big.|3 kg. of it go.|He came in.|Then it is 5 m.|Go.",
    "On Mon. he ran, in Sept. and on Tues. he sat.|It was Mon.|On Mon. Jan. 5 and 3 Feb. 2019 it rained.",
    "Nile Inc. sold 5.|He works at Roy & Co. Ltd. in Rome, not at Nile Inc.|Tom does.",
    "He took approx. 5 min. and max. 7 min. to run.|He ran at 9 mph. and ca. 5 rpm. on.",
    "He lives on Main St.|He has 5 of the St. Mary pens.|Dr. No is 3.",
    "Roe v. Wade was in 1973.|It is v.|Then we go.|MR. ROE HAS RS. 15.|SEE FIG. 3.",
    "John Roe Sr. has 5.|Luego el Sr. Luna llega.|She has an M.Sc. in maths.|He has a B.A.|Tom has none.",
    "We see.|Q. 7 is easy.|In Q. 8 (see Q. 9) we add.|He goes from P to Q.|7 km are left.|Choose Q.|So 5.",
]
MARKUP = [
    "We have $n \\ge 7.$|Then $m = 8.$|We get $$x = 5.$$|So \\(y = 6.\\)|Then 7.",
    "We get \\[x = 9.\\]|Then \\[ y = 6. \\]|So.",
    "It is $n = 5.$ so we go on.|Use `x = 5.`|Then ```y.```|It is \\text{5 cm.}|So $x$ is.",
    "It holds.[1]|Then 6.[2, 3]|Then 7.¹|Then 8.†|Then 9.^{4}|It is 5.[^note]|It is.<sup>2</sup>|So.",
    "<b>It is 5.</b>|<i>Then.</i>|~~No.~~|„Es sind 5.“|»Dann 6.«|***So 7.***|End.",
    "He has 5.$3 and 6.`7` and (it was 5.) and ran.",
]
LISTS = [
    "1. Add 5.|2. Add 6.|3. Stop.",
    "Do this: 1. Add 5.|2. Add 6.",
    "First: 1) add 5.|2) add 6.\n|(3) Add 7.|(4) Add 8.",
    "1.) Add 5.|2.) Add 6.\n|[3] Add 7.|[4] Add 8.",
    "a. Add 5.|b. Add 6.|c) Stop.|D. Go.",
    "i. Add 5.|ii. Add 6.|iii. Add 7.|iv. Add 8.|(v) Stop.",
    "Q1. What is 5?|Q2. What is 6?\n|Q3: Go.",
    "Q1. What is 5?|A1. It is 5.|Q2. And 6?|A2. It is 6.",
    "Q. 3. What is 5?|A3. It is 5.",
    "Q2) What is 5?|A2) It is 5.",
    "Step One. Add 5.|Step Two. Add 6.\n|Step III: Add 7.\n|Part 2. Add 8.|Part 3. Stop.",
    "**1.** Add 5.|**2.** Add 6.\n|### 3. Stop.\n|- 4. Go.|5. End.",
    "1.1. Add 5.\n|1\\. Add 6.\n|1: Add 7.\n|3️⃣ Add 8.",
    # No markers: nothing counts on from one to the next.
    "Q1. What is 5?|A12.|It is a road.",
    "He takes the A1.|It is long.|Q1.|So.",
    "Is it 3 or 4?|4.|So he has 4.|It is 1.|It is 2.|So 3.",
    "Tom: 1.|Ann: 2.|So 3.|See Fig. 1.|Then No. 2.|Go.",
]
SCRIPTS = [
    "राम के पास 5 हैं।|सीता के पास 3 हैं॥|5 हैं।",
    "لديه 5 كتب؟|نعم.|لا",
    "اس کے پاس 5 ہیں۔|اور 3 ہیں۔",
    "5 አለው።|3 አለው፧|እሺ",
    "Նա ունի 5։|Հետո 3։",
    "သူ 5 ရှိတယ်။|သူ 3 ရှိတယ်",
]
WORDLESS = [
    "| x | y |\n|:--|--:|\n||| 5 | 6 |",
    "Go.\n=====\n||Stop.\n~~~~~\n||So.\n* * *\n||Then.\n─────\n||+ 5 |\n+---+\n||End.\n→",
    "Go.\n\\begin{align*}\n||x = 5 \\\\\n\\end{align*}\n||\\begin{tabular}{|c|p{5cm}|} 7\n\\hline\n||Stop.\n\\]",
    "\\begin{array}{cc}\n5 & 6\n\\end{array}.",
    "Go.\n$$\n||x = 5\n$$\n||So.\n```python\n||x = 6\n```\n<ul>\n||<li>7</li>\n</ul>",
]


@pytest.mark.parametrize("marked", [*ABBREVIATIONS, *MARKUP, *LISTS, *SCRIPTS])
def test_sentences_of_a_kind(marked):
    text = marked.replace("\n|", "\n").replace("|", " ")
    expected = [part.strip() for part in marked.split("|")]
    assert pieces(text, split_sentences(text)) == expected
    assert pieces(text, split_sentences(text.replace("।|", "।"))) == expected


def test_no_space_is_needed_behind_the_ends_of_scripts_without_case():
    for text in (
        "他有5个｡|她有3个．|共８．５个。|是吗?！|对",
        "5 हैं।|3 हैं॥|7",
        "5 አለው።|3",
        "So \\[x = 5.\\]|Then $$y.$$|Z",
    ):
        assert pieces(text.replace("|", ""), split_sentences(text.replace("|", ""))) == text.split("|")


@pytest.mark.parametrize("marked", WORDLESS)
def test_a_line_without_words_is_no_step(marked):
    text = marked.replace("\n||", "\n")
    assert pieces(text, split_sentences(text)) == [part.strip() for part in marked.split("\n||")]


@pytest.mark.parametrize("marked", SENTENCES)
def test_sentences(marked):
    text = marked.replace("|", "" if "。" in marked else " ")
    assert pieces(text, split_sentences(text)) == [part.strip() for part in marked.split("|")]


def test_sentences_of_a_region():
    text = "Question? It is 5. So. End"
    assert split_sentences(text, 10, 22) == [(10, 18), (19, 22)]
    assert pieces(text, split_sentences(text, 3, 12)) == ["stion?", "It"]
    assert split_sentences(" \n\t ") == split_sentences("") == split_sentences(text, 4, 4) == []


@pytest.mark.parametrize("function", [split_sentences, find_numbers])
@pytest.mark.parametrize("region", [(-1, 2), (2, 1), (0, 6), (6, None)])
def test_region_outside_the_text(function, region):
    with pytest.raises(ValueError, match="5 characters"):
        function("Five.", *region)


FRAGMENTS = (
    "Mr. |J. |e.g. |U.S. |p.m. |etc. |5 oz. |A. |Tom |he |3.50|1,200|.5|24.|1/2|2 1/2|½|R2D2|3x4|x|1. |2) |- |* |**"
    '|Step 1:|#|\n|\r\n| |  |\t|. |.|! |? |…|。|"|” |(|)|]|=| = |+|-|/|%|$|苹果|é|😀|٣|\u2028|\u200b|°|,|'
)
messy = st.lists(st.sampled_from(FRAGMENTS.split("|")) | st.text(max_size=3), max_size=30).map("".join)


@settings(deadline=None)
@given(messy, st.data())
def test_sentences_partition_the_region(text, data):
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    spans = split_sentences(text, start, end)
    covered = [index for first, last in spans for index in range(first, last)]
    assert covered == sorted(set(covered))
    assert all(start <= first < last <= end and text[first:last] == text[first:last].strip() for first, last in spans)
    assert {index for index in range(start, end) if not text[index].isspace()} <= set(covered)
    for sentence in pieces(text, spans) if len(spans) > 1 else []:
        assert any(char.isalnum() or not char.isascii() or char in "$+<=>^`|~" for char in sentence)


# --- numbers ---

NUMBERS = {
    "Natalia sold 48/2 = 24 clips.": "48 2 24",
    "12 apples and 7.": "12 7",
    "$1,200.50, .5, $.75 and 20% of -3": "1,200.50 .5 .75 20 3",
    "1,2000 and 12,34 and 1234,567 and 5,000,000": "1 2000 12 34 1234 567 5,000,000",
    "It is 24. Not 3.5.": "24 3.5",
    "1.2.3 ...5": "1.2 3 5",
    "the 3rd, 2nd and 21st": "3 2 21",
    "1/2 of it, 3/4-inch, **2/3** and (1/5) of": "1/2 3/4 2/3 1/5",
    "5/4 of it; 2/2": "5 4 2 2",
    "1/2 = 0.5; x=1/2; 1/2 + 1; 1/2*8; 1/2 x 8; 1/2 × 8; 3 ÷ 1/2": "1 2 0.5 1 2 1 2 1 1 2 8 1 2 8 1 2 8 3 1 2",
    "300 / (40/100) and (1/2) * 8": "300 40 100 1 2 8",
    "a box 1/2 full, 1/2 xylophone": "1/2 1/2",
    "2 1/2 cups, 2 1/2 x 4, 2½, 2 ½ and ¾": "2|1/2 2|1/2 4 2½ 2|½ ¾",
    "in 2024 1/2 of; 5 5/4": "2024 1/2 5 5 4",
    "1/2.5, 1/2/2024, 1/2,000": "1 2.5 1 2 2024 1 2,000",
    "R2D2, B12, v1.2.3, x_1, mp3, 2x": "2",
    "3x4, 3X4, 0.2x50, 3x.5, ½x4, 2x3x4": "3 4 3 4 0.2 50 3 .5 ½ 4 2 3 4",
    "GPT-4, Covid-19, _24_ and #5": "4 19 24 5",
    "10:30 on 2024-05-01, 3-5": "10 30 2024 05 01 3 5",
    "١٢ ٣٫٥ ７": "١٢ ٣ ٥ ７",
    "5² m³ x²": "5",
    "我有5个苹果和A4纸": "5",
    "$110 000": "110 000",
    "1. Take 5\n2) Then 6\n(3) And 7\n3.Go": "5 6 7",
    "- 5\n* 1/2 cup\n- 3. So 4\n-5": "5 1/2 4 5",
    "Step 1: Add 5. Step 2: Add 6.\nStep 3. Go\n**Step 4:** 7\n## Step 5\n8": "5 6 7 8",
    "24.\n5) \n1.5 litres\n120. Go": "24 5 1.5 120",
    "48 clips 1. x": "48 1",
    "1/99999999999999999999": "1 99999999999999999999",
    "one half, 10^6, 1e5": "10 6 1",
    "\\sqrt2, \\cdot5, 3\\times4, \\pi6, \\text{cm}7, \\log_2 8": "2 5 3 4 6 7 2 8",
    "\\frac12 and \\dfrac 3 4, \\binom5{6}, \\theta_1 = 7, \\mathrm{R2D2}": "1 2 3 4 5 6 7",
    "1/2\\cdot 8, 3\\div 1/2 and 1/2 of": "1 2 8 3 1 2 1/2",
    "No.5, Rs.1,500.50, Fig.3, p.7 and is.5": "5 1,500.50 3 7 5",
    "Nº5, nº 6, N.º7, Nr.8, Nr. 9, №10, N°11 and no12": "5 6 7 8 9 10 11",
    "$.75, (.5), =.25, \\cdot.6 and _.7_": ".75 .5 .25 .6 .7",
    "1.) Add 5\n(2) Add 6. (3) Add 7\n[4] 8": "5 6 7 8",
    "1. Add 5. 2. Add 6. 3.Stop": "5 6",
    "First: 1) add 5. 2) add 6.": "5 6",
    "ii. Add 5\nQ1. Add 6\n1.1. Add 7\n4: Add 8\n### Case 2: 9": "5 6 7 8 9",
    "Step 1. Add 5. Step 2. Add 6. Step Three. 7": "5 6 7",
    "Is it 3 or 4? 4. So 5. Tom: 1. Ann: 2.": "3 4 4 5 1 2",
    "": "",
}


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers(text):
    assert pieces(text, find_numbers(text)) == [number.replace("|", " ") for number in NUMBERS[text].split()]


def test_numbers_stay_in_the_region():
    text = "12,345 R77 1/2"
    assert pieces(text, find_numbers(text, 1, 5)) == ["2", "34"]
    assert pieces(text, find_numbers(text, 8, 13)) == ["77", "1"]


@settings(deadline=None)
@given(st.text(" 0123456789.,/+-=$%:;()½٣", max_size=30))
def test_every_digit_is_in_one_number(tail):
    text = "So " + tail  # never a list marker
    covered = [index for span in find_numbers(text) for index in range(*span)]
    assert covered == sorted(set(covered))
    assert {index for index, char in enumerate(text) if char.isdecimal() or char == "½"} <= set(covered)


@settings(deadline=None)
@given(messy)
def test_numbers_in_messy_text(text):
    spans = find_numbers(text)
    assert all(left[1] <= right[0] for left, right in pairwise(spans))
    for number in pieces(text, spans):
        assert any(char.isnumeric() for char in number)
        assert not set(number) - set("., /⁄\u00a0") - {char for char in number if char.isnumeric()}
        assert number[-1].isnumeric()


# --- keywords ---

KEYWORDS = [
    ("The cat sat in category 5.", ["cat"], ["cat"]),
    ("Cats, CAT's and cats’ tails; boxes, concat", ["cat", "box"], ["Cats", "CAT's", "cats", "boxes"]),
    ("ice  cream, Ice\ncream, icecream", ["ice cream"], ["ice  cream", "Ice\ncream"]),
    ("New York and York City Hall", ["York", "New York", "York City"], ["New York", "York City"]),
    ("in New York City", ["York City", "new york"], ["New York"]),
    ("cats", ["cat", "cats", "CATS", " cats "], ["cats"]),
    ("C++ and $5 in R.E.M. (E)", ["c++", "$5", "R.E.M.", "(e)"], ["C++", "$5", "R.E.M.", "(E)"]),
    ("Éclair, STRASSE, Straße; ΣΑΣ", ["éclair", "straße", "σας"], ["Éclair", "Straße", "ΣΑΣ"]),
    ("farmer’s market", ["farmer's market"], ["farmer’s market"]),
    ("吃苹果吗 用A4纸", ["苹果", "A4"], ["苹果", "A4"]),
    ("_cat_ cat-like cat5 5cat", ["cat"], ["cat", "cat"]),
    ("a.c abc", ["a.c"], ["a.c"]),
    ("12 and 123", ["12"], ["12"]),
    ("anything", [], []),
]


@pytest.mark.parametrize(("text", "keywords", "expected"), KEYWORDS)
def test_keywords(text, keywords, expected):
    assert pieces(text, find_keywords(text, keywords)) == expected


def test_keywords_stay_in_the_region():
    assert find_keywords("cat cats cat", ["cat"], 1, 11) == [(4, 8)]


def test_bad_keywords():
    with pytest.raises(TypeError, match="sequence of strings"):
        find_keywords("cat", "cat")
    with pytest.raises(TypeError, match="strings only"):
        find_keywords("cat", ["cat", 5])
    with pytest.raises(ValueError, match="empty keyword"):
        find_keywords("cat", ["cat", " \n"])


# --- segment ---


def test_segment():
    question, rationale = " Tom has 5 pens. He buys 1/2 as many? ", "\nMr. Tom buys 5/2 = 2.5.\nSo 7.5. "
    text = "Q:" + question + rationale + "#### 7.5"
    middle, end = 2 + len(question), 2 + len(question + rationale)
    found = segment(text, (2, middle), (middle, end))
    assert pieces(text, found.steps) == [question.strip(), "Mr. Tom buys 5/2 = 2.5.", "So 7.5."]
    assert pieces(text, found.key_words) == "5 1/2 5 2 2.5 7.5".split()  # noqa: SIM905
    found = segment(text, (2, middle), (middle, end), ["tom", "pen"])
    assert pieces(text, found.key_words) == ["Tom", "pens", "Tom"]
    assert segment("a b", (2, 3), (0, 1), ["a", "b"]) == Segments(((2, 3), (0, 1)), ((0, 1), (2, 3)))


@pytest.mark.parametrize(
    ("question", "rationale", "message"),
    [
        ((0, 0), (3, 5), "question must hold text"),
        ((0, 2), (2, 3), "rationale must hold text"),
        ((0, 3), (1, 5), "overlap"),
        ((0, 2), (3, 9), "text of 5 characters"),
    ],
)
def test_segment_refuses(question, rationale, message):
    with pytest.raises(ValueError, match=message):
        segment("ab cd", question, rationale)


# --- tokens ---


def brute_force(span, offsets, text):
    characters = {index for index in range(*span) if not text[index].isspace()}
    hits = [token for token, offset in enumerate(offsets) if characters & set(range(*offset))]
    covered = {index for token in hits for index in range(*offsets[token])}
    if not characters or min(characters) not in covered or max(characters) not in covered:
        return None
    return hits[0], hits[-1] + 1


@st.composite
def tokenised_text(draw):
    text = draw(st.text("ab 5\n", min_size=1, max_size=20))
    offsets, position = [], 0
    while position < len(text):
        kind = draw(st.sampled_from(["token", "token", "token", "skip", "empty", "special"]))
        end = draw(st.integers(position + 1, min(len(text), position + 6)))
        if kind == "special":
            offsets.append((0, 0))
        elif kind == "empty":
            offsets.append((position, position))
        else:
            first = position + len(text[position:end]) - len(text[position:end].lstrip())
            start = first if draw(st.booleans()) else position
            if kind == "token":
                offsets += [(min(start, end), end)] * draw(st.integers(1, 3))  # bytes of one character
            position = end - draw(st.integers(0, 1)) if end - position > 1 else end
    cut = draw(st.integers(0, len(offsets)))
    offsets = offsets[:cut] if draw(st.booleans()) else offsets
    ends = st.integers(0, len(text))
    spans = draw(st.lists(st.tuples(ends, ends).map(lambda pair: tuple(sorted(pair))), max_size=5))
    return text, offsets, spans


@settings(deadline=None)
@given(tokenised_text())
def test_token_spans_match_their_definition(case):
    text, offsets, spans = case
    expected = [brute_force(span, offsets, text) for span in spans]
    if None not in expected:
        assert token_spans(spans, offsets, text) == expected
    for span, token_span in zip(spans, expected, strict=True):
        if token_span is None:
            with pytest.raises(ValueError, match=f"characters {span[0]} to {span[1]}"):
                token_spans([span], offsets, text)


def test_token_spans_by_hand():
    text = "a 12 34 é"
    offsets = [(0, 0), (0, 1), (1, 1), (1, 3), (3, 4), (4, 9), (8, 9), (8, 9), (0, 0)]
    assert token_spans([(0, 1), (2, 4), (5, 7), (8, 9), (1, 5)], offsets, text) == [
        (1, 2),
        (3, 5),
        (5, 6),
        (5, 8),
        (3, 5),
    ]


@pytest.mark.parametrize(
    ("span", "offsets", "message"),
    [
        ((4, 9), [(0, 4)], "no token covers 'apple', characters 4 to 9"),
        ((4, 9), [(0, 4), (4, 7)], "only a part of 'apple'"),
        ((0, 9), [(4, 9)], "only a part of '48  apple'"),
        ((2, 4), [(0, 9)], "no token covers ''"),
        ((0, 2), [(0, 2), (4, 12)], "offsets must lie in the text of 9"),
        ((0, 2), [(0, 2), (4, 9), (0, 2)], "go backwards, token 2"),
    ],
)
def test_token_spans_refuse(span, offsets, message):
    with pytest.raises(ValueError, match=message):
        token_spans([span], offsets, "48  apple")


def test_long_rationales_take_linear_time():
    sentence = "Mr. Tom has 12 apples and 3.5 pens, i.e. 1/2 of 31. "
    text = sentence * 8000
    started = time.process_time()
    found = segment(text, (0, len(sentence)), (len(sentence), len(text)))
    offsets = [(index, index + 4) for index in range(0, len(text), 4)]
    assert len(token_spans(found.steps, offsets, text)) == 8000
    assert len(token_spans(found.key_words, offsets, text)) == 32000
    assert time.process_time() - started < 10  # quadratic code takes minutes


HOSTILE = [
    *('."', "(", "5", "a", " ", "\n", "\\", ",", "1/", "1,234,", " .", " \n", ". 1. ", "A.", "*.", "。", ".[1", ".^{"),
    *("\\begin{a}{", "\\frac", "<a", ": 1) ", "1.1", "cat "),
]


@pytest.mark.parametrize("unit", HOSTILE, ids=repr)
def test_hostile_texts_take_linear_time(unit):
    text = unit * (100_000 // len(unit)) + "x"
    offsets = [(index, min(index + 4, len(text))) for index in range(0, len(text), 4)]
    started = time.process_time()
    token_spans(split_sentences(text), offsets, text)
    find_numbers(text)
    find_keywords(text, ["cat", "ice cream", "...", "a a"])
    assert time.process_time() - started < 10  # quadratic code takes minutes


# --- real tokenizers, trained here ---

CORPUS = [
    "Natalia sold 48/2 = 24 clips in May, which is 1/2 of 48. She sold 1,200.50 in April.",
    "Mr. Smith paid $3.50 for the ice cream 😀 — “naïve” café. Is it 35% of 1200? Yes.",
    "The cat's apples and the cats in category 5 cost 0.2x50=10. So the answer is 100.",
]
TEXT = (
    "Mr. Ünal's cats   ate 1,234.5 apples 😀, 48/2 = 24 (35%) of them. Is 2½ or 1/3 left?\n\n"
    "1. He sold 24+12345=12369 at $3.50. “Naïve” 7️⃣ cats, 5个苹果！\tThen 98765432109876 remain.\n- Cats: .5"
)


def byte_level(trim_offsets=True, individual_digits=False):
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Digits(individual_digits=True)] if individual_digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=trim_offsets)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def llama2():
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.ByteFallback()
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "<s>", *bytes_], show_progress=False)
    tokenizer.train_from_iterator([word for line in CORPUS for word in line.split()], trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def metaspace():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def wordpiece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return tokenizer


def whole_lines():
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "removed")
    return tokenizer


TOKENIZERS = {
    "gpt2": byte_level,
    "gpt2-with-spaces": lambda: byte_level(trim_offsets=False),
    "single-digits": lambda: byte_level(individual_digits=True),
    "llama2": llama2,
    "metaspace": metaspace,
    "wordpiece": wordpiece,
    "whole-lines": whole_lines,
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("keywords", [None, ["cat", "苹果", "Ünal", "naïve"]], ids=["numbers", "keywords"])
def test_real_tokenizers(name, keywords):
    tokenizer = TOKENIZERS[name]()
    tokenizer.enable_padding(length=len(TEXT.encode()) + 5)
    question = (0, TEXT.index("\n"))
    found = segment(TEXT, question, (question[1], len(TEXT)), keywords)
    assert len(found.steps) == 5
    assert len(found.key_words) == (15 if keywords is None else 6)
    offsets = tokenizer.encode(TEXT).offsets
    for spans in (found.steps, found.key_words):
        for (start, end), (first, last) in zip(spans, token_spans(spans, offsets, TEXT), strict=True):
            assert TEXT[start:end] in TEXT[offsets[first][0] : offsets[last - 1][1]]
            for border in (first, last - 1):
                assert max(start, offsets[border][0]) < min(end, offsets[border][1])
            assert first == 0 or max(end for _, end in offsets[:first]) <= start or name == "whole-lines"


@pytest.mark.parametrize("name", ["gpt2", "single-digits", "llama2"])
def test_truncation_is_an_error(name):
    tokenizer = TOKENIZERS[name]()
    number = find_numbers(TEXT)[-2]
    assert TEXT[slice(*number)] == "98765432109876"
    offsets = tokenizer.encode(TEXT).offsets
    [(first, last)] = token_spans([number], offsets, TEXT)
    assert last - first > 1
    assert token_spans([number], offsets[:last], TEXT) == [(first, last)]
    with pytest.raises(ValueError, match="no token covers '98765432109876'"):
        token_spans([number], offsets[:first], TEXT)
    with pytest.raises(ValueError, match="only a part of '98765432109876'"):
        token_spans([number], offsets[: last - 1], TEXT)
    with pytest.raises(ValueError, match="only a part of '98765432109876'"):
        token_spans([number], offsets[first + 1 :], TEXT)


LONG = "How many? 5.\n\nTake 1,200. Add 5.\nThat is 1205.\n \t\n\n...\n\nHalf of 1200 is 600.00, 1/2 of it. So 600.\n"
ASKED, REASONED = (0, 12), (14, len(LONG))


def parts(options):
    found = segment(LONG, ASKED, REASONED, None, options)
    return pieces(LONG, found.steps)[1:], pieces(LONG, found.key_words), found.steps_joined, found.key_words_left_out


@pytest.mark.parametrize(
    ("unit", "steps"),
    [
        (
            "sentence",
            [*("Take 1,200.", "Add 5.", "That is 1205.\n \t\n\n..."), "Half of 1200 is 600.00, 1/2 of it.", "So 600."],
        ),
        ("line", ["Take 1,200. Add 5.", "That is 1205.\n \t\n\n...", "Half of 1200 is 600.00, 1/2 of it. So 600."]),
        (
            "paragraph",
            ["Take 1,200. Add 5.\nThat is 1205.\n \t\n\n...", "Half of 1200 is 600.00, 1/2 of it. So 600."],
        ),
    ],
)
def test_what_a_step_is(unit, steps):
    found, words, *changed = parts(SegmentOptions(step_unit=unit))
    assert (found, changed) == (steps, [0, 0])
    assert words == parts(SegmentOptions())[1]


@pytest.mark.parametrize("most", [2, 3, 4, 5, 6, 7])
def test_neighbouring_steps_are_joined_evenly(most):
    steps, _, joined, _ = parts(SegmentOptions(max_reasoning_steps=most))
    sentences = parts(SegmentOptions())[0]
    assert len(steps) == min(most - 1, len(sentences))
    assert joined == len(sentences) - len(steps)
    counts = [sum(sentence in step for sentence in sentences) for step in steps]
    assert sum(counts) == len(sentences)  # none is cut or lost
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(
    ("most", "words"),
    [
        (2, ["5", "1,200"]),
        (5, ["5", "1,200", "1205", "600.00", "1/2"]),  # not 5 and 1200 again, nor 600, which is 600.00
        (6, ["5", "1,200", "5", "1205", "600.00", "1/2"]),
        (8, ["5", "1,200", "5", "1205", "1200", "600.00", "1/2", "600"]),
    ],
)
def test_distinct_key_words_go_before_repetitions(most, words):
    assert parts(SegmentOptions(max_key_words=most))[1:] == (words, 0, 8 - len(words))


def test_distinct_keywords_whatever_the_case():
    text = "A hen? A Hen and NaN,\nnan, a goose."
    found = segment(text, (0, 6), (7, len(text)), ["hen", "nan", "goose"], SegmentOptions(max_key_words=3))
    assert pieces(text, found.key_words) == ["hen", "NaN", "goose"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step_unit", "word"),
        *product(("max_reasoning_steps", "max_key_words"), (1, 0, -2, True, 2.5)),
    ],
)
def test_segment_options_are_checked(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: is {value!r}, must be"):
        SegmentOptions(**{name: value})
