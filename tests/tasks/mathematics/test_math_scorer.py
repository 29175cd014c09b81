"""The MATH scorer: which answers are equal. Boxes and workers have files of their own."""

import random
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from math_answers import score
from tre_lightning.tasks.mathematics.scorer import MathScorer

# One pair a line: gold | answer.
EQUAL = r"""
5 | x=5
5 | x = 5.
5 | +5
5 | 5.0
5 | \frac{10}{2}
5 | $5$
5 | \text{5}
5 | \text{five}
5 | five
5 | 5 \text{ cm}
5 | 5\text{ square units}
5 | \$5
5 | \$ 5
5 | 5^\circ
5 | 5^{\circ}
5 | 5\degree
5 | 5°
5 | {5}
5 | (5)
5 | \left(5\right)
5 | \{5\}
5 | \boxed{5}
5 | S = 5
5 | a_{10} = 5
5 | f(3) = 5
5 | \angle ABC = 5
5 | \text{Area} = 5
5 | AB = 5
5 | x = \frac{10}{2} = 5
5 | 2+3=5
5 | \displaystyle 5
5 | 5 \, \text{units}
-5 | \text{-}5
0.5 | \frac{1}{2}
0.5 | .5
0.5 | 1/2
0.5 | 50\%
0.5 | 2^{-1}
\frac{1}{2} | \frac12
\frac{1}{2} | \frac1{2}
\frac{1}{2} | \frac{1}2
\frac{1}{2} | \dfrac{2}{4}
-\frac{1}{2} | \frac{-1}{2}
-\frac{1}{2} | \frac{1}{-2}
-\frac{1}{2} | -0.5
\frac{3}{2} | 1\frac{1}{2}
\frac{3}{2} | 1 1/2
\frac{3}{2} | 1 \frac12
-\frac{3}{2} | -1\frac{1}{2}
\frac{1}{3} | 0.\overline{3}
\frac{1}{3} | 0.\bar{3}
\frac{1}{6} | 0.1\overline{6}
50\% | 50
50 | 50\%
50\% | 50 \text{ percent}
50\% | 50%
1000 | 1,000
1000 | 1\,000
1000 | 1{,}000
1000 | 1,\!000
1,\!000 | 1000
1234567 | 1,234,567
1234567.5 | 1,234,567.5
1024 | 2^{10}
300000 | 3 \times 10^5
300000 | 3 \cdot 10^{5}
3000000 | 3 \text{ million}
24 | 2 \text{ dozen}
2\sqrt{3} | \sqrt{12}
2\sqrt{3} | 2\sqrt3
2\sqrt{3} | \sqrt{3}\cdot 2
2\sqrt{3} | \sqrt{3} \times 2
2\sqrt{3} | 2 \sqrt {3}
\frac{\sqrt{2}}{2} | \frac{1}{\sqrt{2}}
\frac{\sqrt{2}}{2} | \sqrt{\frac12}
\frac{\sqrt{2}}{2} | 2^{-1/2}
1+\sqrt{2} | \frac{1}{\sqrt{2}-1}
1+\sqrt{2} | \sqrt{3+2\sqrt{2}}
\sqrt[3]{4} | 4^{1/3}
\frac{\pi}{2} | \frac12\pi
\frac{\pi}{2} | 0.5\pi
\frac{\pi}{2} | \pi/2
x^2-1 | (x-1)(x+1)
x^2-1 | (x+1)(x-1)
x^2-1 | -1+x^2
x^2-1 | x^{2} - 1
x^2-1 | x*x-1
2x+3 | y=2x+3
y=2x+3 | 2x+3
y=2x+3 | y=3+2x
y=2x+3 | 2x+3=y
x^2+y^2=4 | y^2+x^2=4
x^2+y^2=4 | 4=x^2+y^2
2x+3y=6 | 4x+6y=12
x+y-3=0 | x+y=3
\frac{x+1}{x-1} | \frac{1+x}{-1+x}
\frac{x+1}{2} | \frac{x}{2}+\frac12
ab | ba
12abc | 12cab
e^{2x} | (e^x)^2
\sin 2x | 2\sin x\cos x
\sin 2x | \sin(2x)
\sin^2 x | 1-\cos^2 x
\tan x | \frac{\sin x}{\cos x}
\log_2 3 | \frac{\ln 3}{\ln 2}
\ln 4 | 2\ln 2
3+4i | 4i+3
i | \frac{1}{-i}
-1 | -1
n! | n!
|x-1| | |1-x|
\sqrt{x^2} | |x|
(1,2) | (1, 2)
(1,2) | \left( 1,2 \right)
(1,2) | (x,y)=(1,2)
(1,2) | (\frac{2}{2}, 2.0)
[0,1) | \left[0,1\right)
(-\infty,5) | x<5
(-\infty,5] | x \le 5
(2,5) | 2<x<5
[2,5) | 5 > x \ge 2
(-\infty,2)\cup(3,\infty) | x<2 \text{ or } x>3
(-\infty,2)\cup(3,\infty) | (3,\infty)\cup(-\infty,2)
(-\infty,2)\cup(3,\infty) | x \in (-\infty,2) \cup (3,+\infty)
(-\infty,2)\cup(2,\infty) | x \neq 2
(-\infty,\infty) | \mathbb{R}
x<5 | x<5
x<5 | 5>x
x \geq 2 | [2,\infty)
1,2,3 | 3,2,1
1,2,3 | \{1,2,3\}
1,2,3 | 1, 2, \text{ and } 3
1,2,3 | 1,2 and 3
\{1,2\} | \{2,1\}
2,3 | x=2,x=3
2,3 | x=2 \text{ or } x=3
2,3 | x = 2, 3
2,3 | 2 \text{ and } 3
\pm 3 | 3,-3
3,-3 | \pm 3
1+\sqrt{2},1-\sqrt{2} | 1\pm\sqrt{2}
\frac{1\pm\sqrt{5}}{2} | \frac{1+\sqrt{5}}{2}, \frac{1-\sqrt{5}}{2}
(1,2),(3,4) | (3,4),(1,2)
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{bmatrix}1 & 2\\ 3 & 4\end{bmatrix}
\begin{pmatrix}1\\0.5\end{pmatrix} | \begin{pmatrix} 1 \\ 1/2 \end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix} | \left(\begin{array}{c}1\\2\end{array}\right)
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}1\\2\\ \end{pmatrix}
43_5 | 43_{5}
43_5 | 43_5.
-37_8 | -37_{8}
2A_{12} | 2\text{A}_{12}
\text{(A)} | A
\text{(A)} | \text{A}
\text{(A)} | (A)
A | \text{(A)}
A | \mathbf{A}
\text{even} | even
\text{even} | \text{Even}
\text{even} | \mathrm{even}
\text{odd} | odd
\text{Evelyn} | Evelyn
\text{A, C} | A,C
\text{A, C} | C, A
7\text{ hours} | 7
7\text{ hours} | 7 \text{ hour}
7\text{ hours} | 7\mathrm{~hours}
12\text{ cm} | 12\text{ centimeters}
12\text{ cm}^2 | 12\text{ square cm}
12\text{ cm}^2 | 12\text{ cm^2}
12\text{ cm}^2 | 12~\mathrm{cm}^2
12\text{ cm}^2 | 12
\$5 | 5\text{ dollars}
\$1,\!657 | 1657
\$306{,}956.63 | 306956.63
12 | 12^{\text{th}}
12 | 12\text{th}
3:4 | \frac34
3:4 | 3 : 4
8\!:\!34\text{ p.m.} | 8:34 \text{ pm}
\infty | +\infty
x_1 | x_{1}
a_n | a_{n}
\frac{\sqrt{21}}{7} | \frac{3}{\sqrt{21}}
60^\circ | 60
60^\circ, 120^\circ | 120^\circ, 60^\circ
60^\circ, 120^\circ | 60, 120
\frac{9 \sqrt{3}}{4} | \dfrac{9\sqrt{3}}{4}
\cos 20^\circ | \sin 70^\circ
10^{100} | 10^{100}
x^{1/2} | \sqrt{x}
\frac{1+a+b}{c} | \frac{a+b+1}{c}
\sqrt{2} | \sqrt 2 \approx 1.414
\lfloor x\rfloor | \left\lfloor x \right\rfloor
\binom{n}{2} | \frac{n(n-1)}{2}
e^{2x} | \exp(2x)
i\sqrt{3} | \sqrt{-3}
12 | A = \frac{1}{2} \cdot 6 \cdot 4 = 12
12 | 12 \text{th}
5 | \text{5 cm}
0.0011_2 | 0.0011_{2}
\frac{\pi}{3}, \frac{2\pi}{3} | \frac{2\pi}{3}, \frac{\pi}{3}
2^{k-n} | \frac{2^k}{2^n}
(-\infty,-2]\cup\{1\} | a \le -2 \text{ or } a = 1
\frac{2}{3} | \frac{2}{3} \approx 0.67
f(x)=x+1 | f(x) = 1 + x
x \in [-2,7] | -2 \le x \le 7
"""

DIFFERENT = r"""
5 | 6
5 | -5
5 | 
5 | 3 = 5 = 7
7 | 1=2=3=7
5 | 5 \text{ or } 6
5 | 5,6
5 | 5 \text{ and } 6
5 | \pm 5
5 | 5t
3 | 3t
3 | 3m
3 | 3x
5 | 5!
5 | 5 \text{ million}
5 | 5 \text{ dozen}
5 | -(-(-5))
5 | 5.01
5 | 5.0000001
5 | \text{not } 5
5 | 5 \text{ not}
5 | x \ne 5
5 | x < 5
5 | [5,6]
5 | 5_7
n | n_7
n | N
n | n+1
n | n \text{ or } n+1
43_6 | 43_5
43_5 | 43
43 | 43_5
23 | 43_5
\frac{1}{3} | 0.333
\frac{1}{3} | 0.333333333
\frac{1}{3} | 0.33333333333333333333
0.333 | \frac{1}{3}
\frac{1}{2^{99}} | \frac{1}{2^{98}}
1/2^{99} | 1/2^{98}
2^{-200} | 2^{-201}
0 | 2^{-2000}
0 | 10^{-100}
55 | \sum_{k=1}^{10} k
\frac{1}{3} | \int_0^1 x^2 dx
\frac{1}{3} | \int_0^1 x^2 \, dx
e | \lim_{n\to\infty}(1+1/n)^n
120 | 5!
2496 | 48 \cdot 52
2496 | 48\times 52
8 | 5+3
10 | \binom{5}{2}
5 | |{-5}|
2 | \lfloor 2.5 \rfloor
4 | \sqrt{16}
\frac{1}{2} | \sin 30^\circ
\frac{\sqrt{3}}{2} | \sin 60^\circ
\frac{\pi}{6} | \arcsin \frac12
1 | \log_{10} 10
90^\circ | \frac{\pi}{2}
12\text{ cm} | 12\text{ m}
12\text{ cm} | 12\text{ cm}^2
12\text{ cm}^2 | 12\text{ cm}^3
7\text{ hours} | 7\text{ minutes}
\$5 | 5\text{ cents}
50\% | 0.5\%
50\% | 5
50 | 0.5
1000 | 1,00
1000 | 1, 000
1234 | 1,2,3,4
12 | 1 2
21/2 | 2 1/2
\frac{21}{2} | 2\frac12
\frac{5}{2} | 2\cdot\frac12
1 | 2\cdot\frac12
1 | 2\frac12
3 | 2\frac32
(1,2) | (2,1)
(1,2) | [1,2]
(1,2) | [1,2)
(1,2) | \{1,2\}
(1,2) | 1,2
(1,2) | (1,2,3)
(1,2,3) | \{1,2,3\}
\{1,2\} | (1,2)
1,2,3 | 1,2
1,2,3 | 1,2,3,4
1,1,2 | 1,2,2
1,2 | 1,1,2
(-\infty,5) | x \le 5
(-\infty,5) | x > 5
(-\infty,5) | (-\infty,5]
(2,5) | 2<x\le 5
(-\infty,2)\cup(3,\infty) | (-\infty,2)
(-\infty,2)\cup(3,\infty) | x<2 \text{ and } x>3
(2,3) | x>2, x<3
x=5 | k=5
x<5 | y<5
y=2x+3 | y=2x+4
y=2x+3 | x=2y+3
x^2+y^2=4 | x^2+y^2=5
x^2+y^2=4 | x^2-y^2=4
x^2+y^2=4 | 0=0
x^2+y^2=4 | 4=4
5 | 2x=10
x=5 | 2x=10
x^2-1 | x^2+1
x^2-1 | (x-1)^2
x^2-1 | y^2-1
|x| | x
x | |x|
x | \sqrt{x^2}
\sqrt{x^2} | x
2\ln x | \ln x^3
\log 2 | \ln 2
\pi | 3.14
\pi | 3.14159265358979323846
\pi | \frac{22}{7}
\sqrt{2} | 1.41421356237309504880168872420969807856967
e | 2.718281828
i | j
3+4i | 3-4i
\begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{pmatrix}1&3\\2&4\end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}1&2\end{pmatrix}
\begin{pmatrix}1\\2\end{pmatrix} | \begin{vmatrix}1\\2\end{vmatrix}
\text{(A)} | \text{(B)}
A | a
\text{even} | \text{odd}
\text{even} | e v e n t
\text{A, C} | A
\text{A, C} | A, B, C
8:34 \text{ p.m.} | 8:34 \text{ a.m.}
1:2 | 2:1
3:4 | 0.7
2^{2008}-2 | 2^{2008}-3
2^{2009} | 2^{2008}
x^{400} | x^{401}
a_1 | a_2
x' | x
x | x'
f'(x) | f(x)
x^2 | x_2
x^{12} | x^1 2
\sqrt{12} | \sqrt{1}2
2^{10} | 2\cdot 10
\frac{x}{2} | 1/2x
\frac{1}{2x} | 1/2x
-x^2 | (-x)^2
2\sqrt{3} | \sqrt{2}\sqrt{3}
\frac{1}{2} | \frac{1}{2}\%
\emptyset | 0
0 | \emptyset
\infty | -\infty
5 | 5 \approx 7
7 | 5 \approx 7
\sqrt{2} | \sqrt{3} \approx 1.414
\text{no solution} | 0
3\sqrt{2} | 3\sqrt{2}i
\sin x | \sin
\sin 2x | 2\sin x
\sin^2 x | \sin x^2
\sin^{-1} x | \frac{1}{\sin x}
\frac{n(n+1)}{2} | \sum_{k=1}^n k
n! | (n-1)!
\binom{n}{2} | \binom{n}{3}
\lfloor x\rfloor | x
\lfloor x\rfloor | \lceil x\rceil
x+y | xy
(x+1)(x+2) | (x+1),(x+2)
\frac{1}{2} | \frac{1}{2} \approx 0.6
5 | 2{5}
25 | 2{5}
35 | 3\boxed{5}
15 | 3\boxed{5}
f(x)=x+1 | g(x)=x+1
x+1 | x=x+1
0 | \frac{0}{0}
1 | \frac{x}{x}
\frac{1}{0} | \frac{2}{0}
2^{10000} | 2^{10001}
2^{9999}\sqrt{2} | 2^{9999}\sqrt{3}
\frac{d}{dx} | \frac{d}{dy}
x^2 | \frac{d}{dx} \frac{x^3}{3}
\frac{1}{3} | \det\begin{pmatrix}1&0\\0&\frac13\end{pmatrix}
4 | \operatorname{lcm}(2,4)
5 | __import__('os')
5 | '5'
5 | "5"
\text{Evelyn} | \text{Evelyn or Bob}
\text{(A)} | \text{(A) or (B)}
\text{(A)} | A, B
"""


def pairs(table: str) -> list[tuple[str, str]]:
    lines = [line.split(" |", 1) for line in table.strip("\n").split("\n")]
    return [(gold, answer[1:]) for gold, answer in lines]


@pytest.mark.parametrize(("gold", "answer"), pairs(EQUAL))
def test_equal_answers_score_one(scorer: MathScorer, gold: str, answer: str) -> None:
    assert score(scorer, gold, answer) == 1.0


@pytest.mark.parametrize(("gold", "answer"), pairs(DIFFERENT))
def test_different_answers_score_zero(scorer: MathScorer, gold: str, answer: str) -> None:
    assert score(scorer, gold, answer) == 0.0
    assert scorer.timeouts() == 0  # it was looked at


@pytest.mark.parametrize("gold", sorted({gold for gold, _ in pairs(EQUAL + DIFFERENT.lstrip())}))
def test_each_gold_equals_itself(scorer: MathScorer, gold: str) -> None:
    assert score(scorer, gold, gold) == 1.0
    assert score(scorer, gold, f" {gold} ") == 1.0
    assert score(scorer, gold, f"{gold} \\text{{ or }} 9876") == 0.0
    assert score(scorer, gold, f"9876 = {gold}") == 0.0


def renderings(value: Fraction, chance: random.Random) -> list[str]:
    """Ways to write a number."""
    sign = "-" if value < 0 else ""
    upper, lower = abs(value.numerator), value.denominator
    factor = chance.randrange(2, 9)
    texts = [
        f"{sign}\\frac{{{upper * factor}}}{{{lower * factor}}}",
        f"{sign}\\dfrac{{{upper}}}{{{lower}}}",
        f"\\frac{{{sign}{upper}}}{{{lower}}}",
        f"{sign}{upper}/{lower}",
        f"x = {sign}{upper}/{lower}",
        f"${sign}{upper}/{lower}$",
        f"{sign}\\left(\\frac{{{upper}}}{{{lower}}}\\right).",
    ]
    if upper > lower > 1:
        texts.append(f"{sign}{upper // lower}\\frac{{{upper % lower}}}{{{lower}}}")
    if 10**9 % lower == 0:
        digits = str(upper * (10**9 // lower)).zfill(10)
        texts += [f"{sign}{digits[:-9]}.{digits[-9:]}", f"{100 * value}\\%"]
    if lower == 1:
        grouped = f"{int(value):,}"
        texts += [str(value), f"{value}.0", grouped, grouped.replace(",", "\\,")]
    return texts


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    upper=st.integers(-(10**7), 10**7),
    lower=st.sampled_from([1, 1, 2, 3, 4, 5, 7, 8, 12, 125]),
    other=st.fractions(max_denominator=20).filter(bool),
    seed=st.integers(0, 2**32),
)
def test_a_number_equals_its_renderings_and_no_other_number(
    scorer: MathScorer, upper: int, lower: int, other: Fraction, seed: int
) -> None:
    value, chance = Fraction(upper, lower), random.Random(seed)
    gold = chance.choice([text for text in renderings(value, chance) if "%" not in text])
    for text in renderings(value, chance):
        assert score(scorer, gold, text) == 1.0, text
    if value != -other and abs(value + other) != abs(value):
        for text in renderings(value + other, chance):
            if "%" not in text:
                assert score(scorer, gold, text) == 0.0, text


@settings(max_examples=25)
@given(roots=st.lists(st.integers(-9, 9), min_size=2, max_size=3), seed=st.integers(0, 2**32))
def test_a_polynomial_equals_its_factors_and_no_other(
    scorer: MathScorer, roots: list[int], seed: int
) -> None:
    coefficients = [1]
    for root in roots:
        shifted = [0, *coefficients]
        for k, coefficient in enumerate(coefficients):
            shifted[k] -= root * coefficient
        coefficients = shifted
    terms = [f"{c:+}x^{{{k}}}" for k, c in enumerate(coefficients) if c]
    random.Random(seed).shuffle(terms)
    factors = "".join(f"(x{-root:+})" for root in roots)
    assert score(scorer, "".join(terms), factors) == 1.0
    assert score(scorer, factors, "".join(terms)) == 1.0
    assert score(scorer, factors, "".join(terms) + "+x") == 0.0


def test_unicode_mathematics_is_read(scorer: MathScorer) -> None:
    signs = {"-5": "\u22125", "3\\pi": "3\u03c0", "(-\\infty,2]": "x \u2264 2", "x^2": "x\u00b2"}
    for gold, answer in signs.items():
        assert score(scorer, gold, answer) == 1.0
