r"""Equality of MATH answers in LaTeX; the scorer is `..scorer`.

No module needs one that comes later:

* `boxes`: the answer in a response.
* `limits`: what is refused for its size.
* `vocabulary`: the commands, words and units that are known.
* `tree`: text to tokens, grouped by their delimiters.
* `numbers`: the value of a plain number, as a fraction.
* `forms`: what an answer may be: value, list, tuple or interval, union, matrix, equation, ...
* `expressions`: an expression as a value, and as LaTeX that is safe to give to the grammar.
* `units`: the unit of an answer.
* `reader`: tree to form.
* `evaluation`: two expressions by value, in a worker.
* `matching`: two forms part by part.
"""
