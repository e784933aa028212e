"""Damaged and hostile inputs of every kind, a few of each: `tests/fuzz/inputs.py --count 2000` makes many."""


import pytest


@pytest.mark.filterwarnings("ignore")  # of PIL and NumPy, about damaged images
def test_hostile_inputs_end_in_success_or_one_sentence(tmp_path):
    import artefacts
    import inputs

    count, seed = 4 * len(artefacts.TARGETS), 0
    counts, failures = inputs.fuzz(count, seed, tmp_path)
    print(f"{count} cases, seed {seed}: {dict(sorted(counts.items()))}")
    assert not failures, "\n".join(failures)
    assert sum(counts.values()) == count
    assert sum(number for name, number in counts.items() if name.endswith("refused")) > 10
