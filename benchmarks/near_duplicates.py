"""Measure how well and how fast near-duplicates are found, compared with datasketch if it is installed.

PYTHONPATH=tests/support python benchmarks/near_duplicates.py [--records 100000]
"""

import argparse
import random
import re
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import russian_texts

from saigakit.core.display import Table
from saigakit.data import near_duplicates

PLANTED = 1000
SEEDS = (0, 1, 2)
KINDS = {"story": russian_texts.story, "letter": russian_texts.letter}


def search_with_saigakit(texts, common):
    """Return (index of a near-duplicate of each text or -1, s to sign, s to search)."""
    signer = near_duplicates.Signer(common)
    signing = 0.0
    while batch := list(islice(texts, 1000)):
        start = time.perf_counter()
        for text in batch:
            signer.add(text)
        signing += time.perf_counter() - start
    start = time.perf_counter()
    near = near_duplicates.find_within(signer.finish())
    return near, signing, time.perf_counter() - start


def search_with_datasketch(texts, common):
    """Search the same phrases at the same threshold; a candidate must also pass datasketch's estimate."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=near_duplicates.THRESHOLD, num_perm=128)
    signed, near = [], []
    signing = searching = 0.0
    while batch := list(islice(texts, 1000)):
        start = time.perf_counter()
        phrases = [[phrase.encode() for phrase in near_duplicates.split_shingles(text, common)] for text in batch]
        hashes = MinHash.bulk(phrases, num_perm=128)
        middle = time.perf_counter()
        for one in hashes:
            found = (i for i in index.query(one) if one.jaccard(signed[i]) >= near_duplicates.THRESHOLD)
            near.append(next(found, -1))
            index.insert(len(signed), one)
            signed.append(one)
        signing += middle - start
        searching += time.perf_counter() - middle
    return np.array(near), signing, searching


def measure_quality(find, kind, seed):
    """Return the share of edited texts whose original is found, for each edit, and of new texts that match one."""
    rng = random.Random(seed)
    originals = [KINDS[kind](rng) for _ in range(PLANTED)]
    common = near_duplicates.find_boilerplate(originals)
    found = []
    for edit in russian_texts.EDITS.values():
        near = find(iter([*originals, *(edit(text, rng) for text in originals)]), common)[0]
        found.append((near[PLANTED:] == np.arange(PLANTED)).mean())
    unrelated = find(iter([*originals, *(KINDS[kind](rng) for _ in range(PLANTED))]), common)[0]
    return [*found, (unrelated >= 0).mean()]


def measure_cost(find, records):
    """Return (µs per record to sign, s to search, peak memory in MiB above that after one record)."""
    rng = random.Random(0)
    common = near_duplicates.find_boilerplate(russian_texts.story(rng) for _ in range(1000))
    find(iter([russian_texts.story(rng)]), common)
    before = peak_mib()
    _, signing, searching = find((russian_texts.story(rng) for _ in range(records)), common)
    return signing / records * 1e6, searching, peak_mib() - before


def peak_mib():
    """Read Linux's count for this program, since getrusage's starts from the peak of the parent."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def run_alone(measure, *arguments):
    """Run in a separate process, so that the peak memory is that of the measurement."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=100_000)
    records = parser.parse_args().records
    libraries = {"rensa": search_with_saigakit}
    if find_spec("datasketch"):
        libraries["datasketch"] = search_with_datasketch
    rows = []
    for name, find in libraries.items():
        for kind in KINDS:
            shares = np.mean([measure_quality(find, kind, seed) for seed in SEEDS], axis=0)
            rows.append((name, kind, *(f"{share:.1%}" for share in shares)))
    header = ("library", "texts", *(f"found: {edit}" for edit in russian_texts.EDITS), "false")
    print(Table(header, rows, f"{len(SEEDS)} seeds, {PLANTED} texts of each kind; false: new texts that match one."))
    costs = {name: run_alone(measure_cost, find, records) for name, find in libraries.items()}
    rows = [(name, f"{sign:.0f}", f"{search:.1f}", f"{peak:.0f}") for name, (sign, search, peak) in costs.items()]
    length = np.mean([len(russian_texts.story(random.Random(seed)).encode()) for seed in range(1000)])
    note = f"{records:,} stories of {length:.0f} bytes."
    print("", Table(("library", "sign, µs per record", "search, s", "peak, MiB"), rows, note), sep="\n")
    if "datasketch" not in libraries:
        print("datasketch is not installed.")


if __name__ == "__main__":
    main()
