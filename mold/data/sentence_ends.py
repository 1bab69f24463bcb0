"""Where a sentence ends: its marks, what may close behind them, and the periods that end none.

Every pattern is matched once a place and looks at a bounded piece of text, so that a walk over a text is linear.
"""
# ruff: noqa: RUF001 - the look-alike signs below are the ones that texts hold

import re

# Thai, kana, Han and Hangul: words there stand without spaces, so a neighbouring letter is no part of the word.
UNSPACED = r"\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
VULGAR = "¼-¾⅐-⅞↉"
LETTER = rf"[^\W\d_{VULGAR}{UNSPACED}]"
BLANK = r"[^\S\n]"
REACH = 32  # characters looked at on each side of a mark: longer than any abbreviation


def words(text: str) -> frozenset[str]:
    """The words of a list, as a set."""
    return frozenset(text.split())


# No space is needed behind these: the full stops and question marks of CJK, Indic, Arabic, Ethiopic, Burmese, Khmer,
# Tibetan, Mongolian, Armenian and Syriac text. The full-width full stop is a decimal point before a digit.
_SPACELESS = "。！？｡।॥؟۔።፧፨။។៕།༎᠃᠉։܀܁܂‽‼⁇⁈⁉﹒﹖﹗"
CLOSING = rf"""(?:
    [)\]}}"'”’»›」』】）》〉｣］｝＂*_~`$†‡⁰¹²³⁴-⁹⁽⁾\u200e\u200f]
  | [“‘«‹](?=\s|$)                                            # as German and Danish close
  | {BLANK}*+\\[\])]                                          # the end of LaTeX's mathematics
  | \[[^\[\]\n]{{1,20}}\] | \^\{{?\[?\w{{1,3}}\]?\}}?                 # footnotes: [1]  [^2]  ^{{3}}
  | <sup>[^<\n]{{1,8}}</sup> | </[a-z]\w{{0,9}}> | <br{BLANK}?/?>
)*+"""
SENTENCE_END = re.compile(
    rf"(?<![.!?…{_SPACELESS}．])(?P<mark>(?:[.!?…{_SPACELESS}]|．(?!\d))++)(?P<closing>{CLOSING})",
    re.VERBOSE | re.IGNORECASE,
)
# What closes a line of its own needs no space either.
_ENDS_LINE = ("\\]", "$$", ">")

_WORD_BEFORE = re.compile(rf"(?:(?P<previous>\w+)\s+)?(?P<digit>\d?)(?P<word>{LETTER}+(?:\.{LETTER}+)*)$")
_WORD_AFTER = re.compile(r"""[\s("'“‘«\[*_]*(\w*)""")
_NUMBER_AFTER = re.compile(r"[\s(\[{*_`#$€£₹¥~\\+−-]*(?:\d|(?:eq|page)?ref\b)")
_LABEL_AFTER = re.compile(r"[\s(\[*_$]*(?:[A-Z]|[IVXL]{2,5})\b(?!')")
# A unit that is also a word or a letter counts behind a number alone.
_UNIT_BEFORE = re.compile(rf"(?:[\d{VULGAR}]\$?[\s-]?|\b(?:sq|cu)\.\s)(?:in|m|g|l|h|s|am|pm)$", re.IGNORECASE)
_NO_SENTENCE_START = tuple("=+×÷,;:")

_NEVER_LAST = words("mr mrs ms mx messrs dr prof st rev capt msgr mme mlle sra srta vs e.g i.e eg ie cf viz")
_BEFORE_NAME = words(
    "Sgt sgt Lt lt Cpl cpl Pvt Cmdr Supt "
    "Gen Col Maj Adm Brig Comdr Ens Pfc Sen Rep Gov Pres Hon Amb Atty Det Insp Fr Br Sr Assoc Asst Mt Ft Pt Bros Univ"
)
_BEFORE_CAPITAL_PART = words("Ltd Inc Corp Co Jr Sr")
_LAST_BEFORE_CAPITAL = words(
    "etc al a.m p.m approx ca inc co ltd corp bros jr sr dept ave blvd avg incl excl esp resp ibid univ govt est "
    "ph.d m.d b.a m.a b.sc m.sc m.b.a oz ft lb lbs min mins hr hrs sec secs yd yds mi pt pts qt qts gal gals fl sq cu "
    "mph kmh rpm tsp tsps tbsp tbsps wk wks mo yr yrs mm cm dm km mg gm gms gr kg kgs ml cl dl cc doz dz pc pcs pkg "
    "pkgs deg max temp vol wt ht rs kr"
)
_BEFORE_NUMBER = words(
    "No Nos no nos Nº p pp Rs rs Re Fr fr Kr kr Tk tk Dh Dhs Sh sh Ksh KSh Tsh Ush Rp Bs Php max Max"
)
# "Q. 7 is easy", "see Q. 7", but "from P to Q. 7 km".
_BEFORE_QUESTION = frozenset(("", "in", "see", "of", "for", "cf"))
_REFERENCES = words(
    "Fig Figs fig figs Eq Eqs Eqn eq eqs eqn Vol Vols vol vols Ch Chs ch chs Chap chap Sec Sect sec sect Tab Thm thm "
    "Lem Prop Def Cor Ex ex Ref Refs ref refs Alg Art App Bk Ed Pt pt Rm Apt Bldg Hwy Rte Par par Para para Prob prob "
    "Ques Qn Lec Col col Abb Nr"
)
_DATES = words(
    "Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov Dec Mon Tue Tues Wed Thu Thur Thurs Fri Sat Sun "
    "jan feb apr aug sept oct nov dec mon tue tues thu thur thurs fri"
)
# After a single letter, a rank or "U.S." these open a sentence ("The answer is A. This ..."); other capitals go on with
# a name.
_OPENERS = words(
    "A After All Also An And Another As At Because Both But By Each Even Every Finally First For From He Hence Her His "
    "How However I If In It Its Let My Next No Not Now On Once One Only Option Or Our Second She Since So That The "
    "Their Then There Therefore These They This Those Thus To We What When Where Which While Who With You Your"
)
_LABELS = "ABCDEXYZv"  # choices, unknowns, and "Roe v. Wade": they go on only behind another name ("Mary B. Smith")


def ends_sentence(text: str, match: re.Match) -> bool:
    """Whether a match of SENTENCE_END in the text ends a sentence, judged by the line around it."""
    mark, closing = match["mark"], match["closing"]
    after = text[match.end() : match.end() + REACH].partition("\n")[0]
    if after[:1].strip() and not mark.strip(".!?…") and not closing.endswith(_ENDS_LINE):
        return False
    before = text[max(0, match.start() - REACH) : match.start()].rpartition("\n")[2]
    following = _WORD_AFTER.match(after)[1]  # type: ignore[index]  # matches anything
    if (closing and following[:1].islower()) or after.lstrip().startswith(_NO_SENTENCE_START):
        return False
    return mark != "." or not after.strip() or not _abbreviates(before, following, after)


def _name(word: str) -> str:
    """ "FIG" is "Fig": the lists have every other form of a word."""
    return word.capitalize() if word.isupper() and len(word) > 1 and word not in _REFERENCES else word


def _abbreviates(before: str, following: str, after: str) -> bool:
    """Whether the period between `before` and `after`, whose first word is `following`, belongs to an abbreviation."""
    match = _WORD_BEFORE.search(before)
    if not match:
        return False
    word, name, lower, previous = match["word"], _name(match["word"]), match["word"].lower(), match["previous"] or ""
    capital_follows, small_follows = following[:1].isupper(), following[:1].islower()
    name_follows = capital_follows and following not in _OPENERS
    if lower in _NEVER_LAST:
        # "31st." is no saint, and "Main St. He" no Mr. He.
        street = name in ("St", "Dr") and previous[:1].isupper() and following in _OPENERS
        return not match["digit"] and not street
    if name in _BEFORE_NAME and (name_follows or (word.islower() and small_follows)) and not previous[-1:].isnumeric():
        # "John Smith Sr. Tom": a suffix; "el Sr. Luna": a title.
        return name != "Sr" or not previous[:1].isupper()
    if name in _BEFORE_NUMBER | _REFERENCES | _DATES and _NUMBER_AFTER.match(after):
        return True
    if word == "Q" and previous.lower() in _BEFORE_QUESTION and _NUMBER_AFTER.match(after):
        return True
    if name in _REFERENCES and _LABEL_AFTER.match(after):
        return True
    if name in _DATES:
        return not capital_follows or following in _DATES
    if lower in ("no", "nos"):
        return following == "of"
    if lower in _LAST_BEFORE_CAPITAL or lower.rpartition(".")[2] in _LAST_BEFORE_CAPITAL:
        return not capital_follows or following in _BEFORE_CAPITAL_PART
    if small_follows and _UNIT_BEFORE.search(before):
        return True
    if len(word) == 1:
        is_initial = ((word.isupper() and word != "I") or word == "v") and name_follows
        return is_initial and (word not in _LABELS or (previous[:1].isupper() and previous != following))
    return all(len(part) == 1 for part in word.split(".")) and following not in _OPENERS
