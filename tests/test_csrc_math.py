"""The C++ mathematics of csrc/math, compiled alone: every code, and windows against their definition."""

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest

from fastcnn.shapes import MAX_WINDOW_PLACES, RELU_OFF, Window

MATH = Path(__file__).parents[1] / "csrc" / "math"
SOURCE = """
#include "divisor.h"
#include "lrn.h"
#include "power.h"
#include "select.h"
#include "window.h"
using namespace fastcnn;
extern "C" {
int64_t divided(int64_t number, int64_t divisor) { return Divisor(divisor).quotient(number); }
int64_t max_window_places() { return MAX_WINDOW_PLACES; }
int32_t relu_off_code() { return RELU_OFF; }
int32_t code(int64_t r, int64_t s, Axis columns) { return code_of(r, s, columns); }
int64_t code_row(int32_t code, Axis columns) { return row_of(code, columns); }
int64_t code_column(int32_t code, Axis columns) { return column_of(code, columns); }
int64_t windows(Axis axis, int64_t length, bool ceil_mode) { return output_size(axis, length, ceil_mode); }
int64_t begin_place(Axis axis, int64_t window) { return first_place(axis, window); }
int64_t end_of_places(Axis axis, int64_t window, int64_t length) { return end_place(axis, window, length); }
int64_t begin_inside(Axis axis, int64_t windows) { return first_inside(axis, windows); }
int64_t end_of_inside(Axis axis, int64_t windows, int64_t length) { return end_inside(axis, windows, length); }
int64_t from_window(Axis axis, int64_t pixel) { return first_window(axis, pixel); }
int64_t to_window(Axis axis, int64_t pixel, int64_t windows) { return last_window(axis, pixel, windows); }
int64_t place(Axis axis, int64_t window, int64_t pixel) { return place_at(axis, window, pixel); }
bool value_wins(float value, float best) { return wins(value, best); }
float relu_of(float value) { return relu(value); }
float factor(float scale) { return lrn_factors<Power::THREE_QUARTERS>(LRN{5, 0, 0.75f, 0}, scale).factor; }
float multiplied(float scale) { return multiplied_factor(scale); }
float next_factor(float scale) { return lrn_factors<Power::THREE_QUARTERS>(LRN{5, 0, 0.75f, 0}, scale).next; }
float refined_factor(float scale, float root, float quarter) { return refined(scale, root, quarter).factor; }
float refined_next(float scale, float root, float quarter) { return refined(scale, root, quarter).next; }
float any_factor(float scale, float beta) { return lrn_factors<Power::ANY>(LRN{5, 0, beta, 0}, scale).factor; }
}
"""
NAN, INF = math.nan, math.inf


class Axis(ctypes.Structure):
    """fastcnn::Axis."""

    _fields_ = [(name, ctypes.c_int64) for name in ("size", "stride", "padding", "dilation")]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Compile the headers, with warnings as errors and without torch."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("math")
    (folder / "math.cpp").write_text(SOURCE)
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{MATH}"]
    subprocess.run([compiler, *flags, "math.cpp", "-o", "math.so"], cwd=folder, check=True)
    loaded = ctypes.CDLL(str(folder / "math.so"))
    for name in ("divided", "code_row", "code_column", "windows", "begin_place", "end_of_places", "begin_inside"):
        getattr(loaded, name).restype = ctypes.c_int64
    for name in ("end_of_inside", "from_window", "to_window", "place", "max_window_places"):
        getattr(loaded, name).restype = ctypes.c_int64
    for name in ("relu_of", "factor", "next_factor", "any_factor", "multiplied", "refined_factor", "refined_next"):
        getattr(loaded, name).restype = ctypes.c_float
    loaded.value_wins.restype = ctypes.c_bool
    return loaded


def integer(value):
    return ctypes.c_int64(value)


def real(value):
    return ctypes.c_float(value)


def axes():
    """Yield every small axis that torch's pooling allows, and some of convolutions, with an image's length."""
    for size in range(1, 5):
        for stride in range(1, 5):
            for padding in range(size // 2 + 1):
                for dilation in range(1, 4):
                    for length in range(1, 12):
                        yield size, stride, padding, dilation, length


def windows_of(size, stride, padding, dilation, length, ceil_mode):
    """Return torch's number of windows, as the Python half has it."""
    window = Window((size, 1), (stride, 1), (padding, 0), (dilation, 1), ceil_mode)
    return window.output_size(length, 1)[0]


def test_constants_are_those_of_the_python_half(library):
    assert library.max_window_places() == MAX_WINDOW_PLACES
    assert library.relu_off_code() == RELU_OFF


def test_divisors_divide(library):
    divisors = [*range(1, 300), *(2**k + off for k in range(9, 33) for off in (-1, 0, 1)), 3 * 10**9]
    for divisor in divisors:
        limits = [0, 2**31 - 1, 2**31, 2**40 + 12345]
        numbers = {n for limit in limits for base in (limit // divisor * divisor,) for n in range(base - 2, base + 3)}
        for number in (n for n in numbers if n >= 0):
            assert library.divided(integer(number), integer(divisor)) == number // divisor, (number, divisor)


def test_every_code_names_its_place_and_no_other(library):
    for columns in range(1, MAX_WINDOW_PLACES + 1):
        axis = Axis(columns, 1, 0, 1)
        for code in range(MAX_WINDOW_PLACES):
            row, column = library.code_row(code, axis), library.code_column(code, axis)
            assert (row, column) == divmod(code, columns)
            assert library.code(integer(row), integer(column), axis) == code


def test_number_of_windows_is_torchs(library):
    for *numbers, length in axes():
        for ceil_mode in (False, True):
            expected = windows_of(*numbers, length, ceil_mode)
            if expected > 0:
                assert library.windows(Axis(*numbers), integer(length), ceil_mode) == expected, (numbers, length)


def test_places_inside_the_image_and_windows_over_a_pixel(library):
    for *numbers, length in axes():
        size, stride, padding, dilation = numbers
        axis, count = Axis(*numbers), windows_of(*numbers, length, True)
        pixels = {w: [w * stride - padding + p * dilation for p in range(size)] for w in range(max(count, 0))}
        whole = []
        for w, covered in pixels.items():
            inside = [p for p, pixel in enumerate(covered) if 0 <= pixel < length]
            begin = library.begin_place(axis, integer(w))
            end = library.end_of_places(axis, integer(w), integer(length))
            assert list(range(begin, end)) == inside, (numbers, length, w)
            whole += [w] if len(inside) == size else []
        if count > 0:
            begin = library.begin_inside(axis, integer(count))
            assert list(range(begin, library.end_of_inside(axis, integer(count), integer(length)))) == whole
        for pixel in range(length):
            begin, end = (
                library.from_window(axis, integer(pixel)),
                library.to_window(axis, integer(pixel), integer(count)),
            )
            places = {w: library.place(axis, integer(w), integer(pixel)) for w in range(begin, end + 1)}
            found = {w: place for w, place in places.items() if place >= 0}
            assert found == {w: covered.index(pixel) for w, covered in pixels.items() if pixel in covered}


@pytest.mark.parametrize(
    ("value", "best", "wins"),
    [(2, 1, True), (1, 2, False), (1, 1, False), (0.0, -0.0, False), (NAN, 1, True), (NAN, NAN, True), (1, NAN, False)],
)
def test_a_later_value_wins(library, value, best, wins):
    assert library.value_wins(real(value), real(best)) is wins


def test_relu_keeps_nan(library):
    assert math.isnan(library.relu_of(real(NAN)))
    assert [library.relu_of(real(value)) for value in (-INF, -1.0, 0.0, 2.0, INF)] == [0, 0, 0, 2, INF]


def test_lrn_factors_are_powers_of_the_scale(library):
    for scale in (1e-15, 1e-3, 1.0, 2.0, 3.7, 1e4, 1e15):
        assert library.factor(real(scale)) == pytest.approx(scale**-0.75, rel=1e-6)
        assert library.next_factor(real(scale)) == pytest.approx(scale**-1.75, rel=1e-6)
        assert library.any_factor(real(scale), real(-0.3)) == pytest.approx(scale**0.3, rel=1e-6)
    assert library.factor(real(INF)) == library.next_factor(real(INF)) == 0
    assert math.isnan(library.factor(real(NAN)))
    assert library.factor(real(0.0)) == INF


def test_refined_factors(library):
    """Within 2.5 and 5 units of 2 ** -24 from a GPU's roots at their documented errors: 2 and 1 in the last place."""
    for step in range(-99 * 8, 127 * 8 - 1):
        scale = ctypes.c_float(2 ** (step / 8 + 0.06)).value
        for off in range(-2, 3):
            for also in range(-1, 2):
                root = ctypes.c_float(scale**-0.5 * (1 + off * 2**-23)).value
                arguments = real(scale), real(root), real(root**0.5 * (1 + also * 2**-23))
                assert library.refined_factor(*arguments) == pytest.approx(scale**-0.75, rel=2.5 * 2**-24)
                if 2**-70 < scale < 2**70:  # the next is no float else
                    assert library.refined_next(*arguments) == pytest.approx(scale**-1.75, rel=5 * 2**-24)
    assert library.refined_factor(real(INF), real(0.0), real(0.0)) == 0
    assert library.refined_next(real(INF), real(0.0), real(0.0)) == 0
    assert library.refined_factor(real(0.0), real(INF), real(INF)) == INF
    assert math.isnan(library.refined_factor(real(NAN), real(NAN), real(NAN)))


def test_multiplied_factor(library):
    """Within 2.5 units of 2 ** -24 of scale ** -0.75, over every binade that kernels hand it."""
    for step in range(-99 * 64, 127 * 64):
        scale = ctypes.c_float(2 ** (step / 64)).value
        assert library.multiplied(real(scale)) == pytest.approx(scale**-0.75, rel=2.5 * 2**-24)
    assert math.isnan(library.multiplied(real(NAN)))
