"""The program's random numbers by counter (src/base/rng.h), written anew with numpy: Philox4x32-10 (Salmon et al. 2011,
doi:10.1145/2063384.2063405), the key of a sample, the uniform numbers of dropout, and the order of an epoch."""
import numpy as np

DROPOUT_SITE, SHUFFLE_SITE = 16, 2
MASK32 = np.uint64(0xFFFFFFFF)


def philox(counter, key):
    """Ten rounds over `counter`, four arrays of 32-bit words, with a key of two words: four arrays."""
    c = [np.asarray(word, dtype=np.uint64) for word in counter]
    k = [np.uint64(word) for word in key]
    for _ in range(10):
        first, second = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(second >> np.uint64(32)) ^ c[1] ^ k[0], second & MASK32, (first >> np.uint64(32)) ^ c[3] ^ k[1], first & MASK32]
        k = [(k[0] + np.uint64(0x9E3779B9)) & MASK32, (k[1] + np.uint64(0xBB67AE85)) & MASK32]
    return c


def halves(number):
    return number & 0xFFFFFFFF, number >> 32


def sample_key(seed, step, sample):
    """The two key words of (seed, step, global sample)."""
    words = philox([*halves(step), *halves(sample)], halves(seed))
    return int(words[0]), int(words[1])


def uniforms(key, first, count, site, layer):
    """Elements [first, first + count) in [0, 1), float32."""
    elements = np.arange(first, first + count, dtype=np.uint64)
    blocks = elements >> np.uint64(2)
    words = np.stack(philox([blocks & MASK32, blocks >> np.uint64(32), site, layer], key))
    chosen = words[(elements & np.uint64(3)).astype(np.int64), np.arange(count)]
    return (chosen >> np.uint64(8)).astype(np.float32) * np.float32(2.0**-24)


def permuted(seed, epoch, count, index):
    """Position `index` of the order of an epoch: a Feistel network of four rounds, walked until it lands inside."""
    if count <= 1:
        return 0
    half_bits = 2
    while half_bits < 32 and count > 1 << (2 * half_bits):
        half_bits += 1
    mask, key, at = (1 << half_bits) - 1, sample_key(seed, epoch, 0), index
    while True:
        left, right = at >> half_bits, at & mask
        for layer in range(4):
            word = int(philox([*halves(right), SHUFFLE_SITE, layer], key)[0])
            left, right = right, left ^ (word & mask)
        at = left << half_bits | right
        if at < count:
            return at
