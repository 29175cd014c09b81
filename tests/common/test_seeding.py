"""Tests of tre_lightning.common.seeding."""

import itertools

import torch

from tre_lightning.common.seeding import derived_seed, generator, permutation, uniforms


def test_a_seed_is_the_same_on_every_machine_and_version() -> None:
    # printf "('responses', 42, 'train', 7)" | b2sum -l 64, without the last bit. Another value
    # would silently change what resumed and repeated runs draw.
    assert derived_seed("responses", 42, "train", 7) == 0x9ABD5CF229210CFF >> 1


def test_different_keys_give_different_63_bit_seeds() -> None:
    keys = [("a", 1, 2), ("a", 12), ("a", 2, 1), ("a1", 2), ("a", "1", 2), ("a",), (1,), ("1",), ()]
    seeds = [derived_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_numbers_depend_on_the_key_alone() -> None:
    torch.manual_seed(1)
    first = uniforms(3, 4, "x", 1), permutation(20, "x", 1)
    torch.manual_seed(2)
    torch.rand(5)
    second = uniforms(3, 4, "x", 1), permutation(20, "x", 1)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(uniforms(3, 4, "x", 2), first[0])
    assert not torch.equal(permutation(20, "x", 2), first[1])


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    uniforms(2, 2, "x")
    permutation(5, "x")
    generator("x")
    assert torch.equal(torch.rand(4), expected)


def test_uniforms_fill_the_unit_interval() -> None:
    numbers = uniforms(100, 100, "x")
    assert numbers.shape == (100, 100) and numbers.dtype == torch.float64
    assert ((numbers >= 0) & (numbers < 1)).all()
    tenths = (numbers * 10).long().flatten().bincount(minlength=10)
    assert tenths.tolist() == [int(n) for n in tenths if 850 < n < 1150]  # 1000 +- 5 sigma
    assert numbers.unique().numel() == numbers.numel()


def test_a_permutation_holds_every_number_once() -> None:
    for size, key in itertools.product((1, 2, 17), range(3)):
        assert sorted(permutation(size, key).tolist()) == list(range(size))
