import numpy as np
import pytest

from saigakit.weights import blas


def floats(*shape):
    return np.random.default_rng(shape).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("inner", [1, 8, 64, 300])
@pytest.mark.parametrize("has_openblas", [True, False])
def test_a_product_is_added_in_place(inner, has_openblas, monkeypatch):
    if not has_openblas:
        monkeypatch.setattr(blas, "_gemm", lambda: None)
    left, right, into = floats(128, inner), floats(inner, 96), floats(128, 96)
    exact = into.astype(np.float64) + left.astype(np.float64) @ right.astype(np.float64)
    blas.add_product(left, right, into)
    np.testing.assert_allclose(into, exact, rtol=0, atol=1e-5 * inner**0.5)


def test_numpys_wheel_has_the_function():
    assert blas._gemm() is not None


def test_parts_of_matrices_are_read_where_they_are():
    left, right, whole = floats(16, 8), floats(8, 12), np.zeros((40, 12), np.float32)
    blas.add_product(left[:, 2:5], right[2:5], whole[8:24])
    np.testing.assert_allclose(whole[8:24], left[:, 2:5] @ right[2:5], atol=1e-6)
    assert not whole[:8].any()
    assert not whole[24:].any()


def test_without_ranks_nothing_is_added():
    into = floats(4, 6)
    before = into.copy()
    blas.add_product(floats(4, 0), floats(0, 6), into)
    np.testing.assert_array_equal(into, before)


@pytest.mark.parametrize("into", [np.zeros((4, 5), np.float32), np.zeros((6, 4), np.float32).T])
def test_shapes_that_do_not_fit_are_refused(into):
    with pytest.raises(ValueError, match="into"):
        blas.add_product(floats(4, 3), floats(3, 6), into)


def test_the_number_of_threads_is_set_and_told():
    before = blas.set_threads(1)
    assert blas.set_threads(before) == 1
