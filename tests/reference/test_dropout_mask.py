import pytest
import torch

from nf4.reference.dropout_mask import dropout_mask, philox

# Known answers of the authors' Random123 library, kat_vectors: philox4x32 10.
VECTORS = [
    (0, 0, ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]),
]


@pytest.mark.parametrize(("seed", "counter", "words"), VECTORS)
def test_philox_gives_the_authors_known_answers(seed, counter, words) -> None:
    found = philox(torch.tensor(seed), torch.tensor([counter]))[0].tolist()
    assert [f"{w:08x}" for w in found] == words


def test_philox_matches_a_wide_integer_version() -> None:
    def literal(seed: int, counter: int) -> list[int]:
        mask = 2**32 - 1
        c = [counter & mask, counter >> 32, 0, 0]
        k = [seed & mask, seed >> 32]
        for _ in range(10):
            first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [second >> 32 ^ c[1] ^ k[0], second & mask, first >> 32 ^ c[3] ^ k[1], first & mask]
            k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
        return c

    for seed, counter in [(1, 2), (2**62 + 12345, 2**40 + 7), (2**63 - 2, 2**62 + 1)]:
        assert philox(torch.tensor(seed), torch.tensor([counter]))[0].tolist() == literal(
            seed, counter
        )


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_dropout_mask_drops_the_share_asked_for(p) -> None:
    keep = dropout_mask(torch.tensor(3), torch.Size([1000, 1000]), p)
    sigma = (p * (1 - p) / keep.numel()) ** 0.5
    assert abs((~keep).double().mean().item() - p) < 5 * sigma


def test_dropout_mask_depends_on_seed_and_position_only() -> None:
    shape = torch.Size([7, 33])
    first = dropout_mask(torch.tensor(1), shape, 0.5)
    assert torch.equal(first, dropout_mask(torch.tensor(1), shape, 0.5))
    assert not torch.equal(first, dropout_mask(torch.tensor(2), shape, 0.5))
    longer = dropout_mask(torch.tensor(1), torch.Size([14, 33]), 0.5)
    assert torch.equal(first, longer[:7])
