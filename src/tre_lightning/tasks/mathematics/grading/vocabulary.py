r"""The commands, words and units that are known, and what each of them means."""


def word_set(words: str) -> frozenset[str]:
    """``"a b"`` as {"a", "b"}."""
    return frozenset(words.split())


def word_table(text: str) -> dict[str, str]:
    """``"a b: c, d: e"`` as {"a": "c", "b": "c", "d": "e"}."""
    rows = (row.rsplit(": ", 1) for row in text.split(", "))
    return {word: value for words, value in rows for word in words.split()}


UNICODE = str.maketrans(
    word_table(
        "\N{GREEK SMALL LETTER PI}: \\pi , \N{GREEK SMALL LETTER THETA}: \\theta , "
        "\N{GREEK SMALL LETTER ALPHA}: \\alpha , \N{GREEK SMALL LETTER BETA}: \\beta , "
        "\N{INFINITY}: \\infty , \N{UNION}: \\cup , \N{ELEMENT OF}: \\in , "
        "\N{LESS-THAN OR EQUAL TO}: \\le , \N{GREATER-THAN OR EQUAL TO}: \\ge , "
        "\N{NOT EQUAL TO}: \\ne , \N{MULTIPLICATION SIGN}: \\times , \N{MIDDLE DOT}: \\cdot , "
        "\N{DIVISION SIGN}: \\div , \N{SQUARE ROOT}: \\sqrt , \N{PLUS-MINUS SIGN}: \\pm , "
        "\N{DEGREE SIGN}: ^\\circ , \N{MINUS SIGN} \N{EN DASH}: -, "
        "\N{SUPERSCRIPT TWO}: ^{2}, \N{SUPERSCRIPT THREE}: ^{3}"
    )
)
SKIPPED = word_set(
    r"\, \; \: \! \> \left \right \big \Big \bigg \Bigg \bigl \bigr \Bigl \Bigr \biggl \biggr"
    r" \displaystyle \textstyle \scriptstyle \limits \nolimits \quad \qquad \rm \bf \it \( \) \[ \]"
    r" \phantom \boxed \fbox ~ $"
) | {"\\ "}
ALIAS = word_table(
    r"\dfrac \tfrac \cfrac: \frac, \dbinom \tbinom: \binom, \leq \leqslant: \le,"
    r" \geq \geqslant: \ge, \lt: <, \gt: >, \neq: \ne, \lbrace: \{, \rbrace: \}, \lbrack: [,"
    r" \rbrack: ], \langle: (, \rangle: ), \lvert \rvert \vert: |, \cdot \times \ast: *, \div: /,"
    r" \colon: :, \%: %, \overline: \bar"
)
TEXT_COMMANDS = word_set(
    r"\text \mbox \hbox \textbf \textit \textrm \textnormal \textsf \texttt \emph \mathrm \mathbf"
    r" \mathit \mathsf \operatorname"
)
# Each with the kind that it is; see `features_of`.
FUNCTIONS = word_table(
    "sin cos tan cot sec csc: trigonometric, sinh cosh tanh coth: hyperbolic,"
    " arcsin arccos arctan: inverse, log ln: logarithm, exp: exponential"
)
NUMBER_WORDS = word_table(
    "zero: 0, one: 1, two: 2, three: 3, four: 4, five: 5, six: 6, seven: 7, eight: 8, nine: 9,"
    " ten: 10, eleven: 11, twelve: 12"
)
# Words that stand beside a number without \text around them.
BARE_WORDS = word_set("cm mm km kg ft mi mph min hr hrs sec am pm th st nd rd")
GREEK = word_set(
    r"\alpha \beta \gamma \theta \lambda \mu \omega \phi \rho \sigma \tau \epsilon \delta"
    r" \varphi \psi \eta \kappa \nu \xi \Delta \Omega \Sigma \Phi"
)
UNIT_WORDS = word_table(
    "centimeter centimetre: cm, millimeter: mm, kilometer kilometre: km, meter metre: m,"
    " feet ft: foot, inche in: inch, mi: mile, minute: min, second: sec, hr: hour, kilogram: kg,"
    " sq: square, usd: dollar, percent: %, deg: degree"
)
SCALES = {
    "dozen": 12,
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
# A number with one of these beside it is another number, or two, or none.
NOT_A_UNIT = word_set(
    "or and not no non if but either neither nor minus plus times negative positive over under by"
    " half third quarter squared cubed factorial root less more below above most least than about"
    " approximately roughly around between to is are equals except modulo mod base"
)
