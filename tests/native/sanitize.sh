#!/usr/bin/env bash
# Builds the engine with AddressSanitizer and UndefinedBehaviorSanitizer and runs its tests on it: sanitize.sh PYTHON [PYTEST ARGUMENTS]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cmake -S . -B "$work/build" -DQBERT_SANITIZE=ON -DCMAKE_BUILD_TYPE=Release >/dev/null
cmake --build "$work/build" --parallel
mkdir "$work/package"
cp -r modeling_qbert tests "$work/package"
cp "$work/build/native/_engine.so" "$work/package/modeling_qbert/"
cd "$work/package"
# An editable install's finder comes before every path.
echo 'import sys; sys.meta_path = [f for f in sys.meta_path if "Redirecting" not in type(f).__name__]' > sitecustomize.py
nm -D modeling_qbert/_engine.so | grep __asan >/dev/null || { echo "the engine was built without the sanitizers" >&2; exit 1; }
# Python leaks by design, and torch's own libraries are not instrumented.
export ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0:halt_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so) $(g++ -print-file-name=libstdc++.so)" \
  QBERT_CASES="${QBERT_CASES:-2000}" PYTHONPATH="$work/package" OMP_NUM_THREADS=2 \
  "$python" -c "import sys, pytest; from modeling_qbert import native; assert native.__file__.startswith('$work'), native
sys.exit(pytest.main(sys.argv[1:]))" -q -p no:cacheprovider tests/native -k "not without_the_library and not aarch64" "${@:2}"
