#!/usr/bin/env bash
# Make one virtual environment per peer under DIR (default .bench-venvs/): their dependencies conflict.
# Running it again only makes what is missing or was made from other requirements.
#   setup.sh [DIR] [PEER...]      PEER: loop pfl blazefl fedjax flwr robust (default: all of them)
# A peer that cannot be made costs one line on standard error and an exit status of 1, not the other peers.
set -uo pipefail

dir=${1:-.bench-venvs}
shift || true
peers=${*:-loop pfl blazefl fedjax flwr robust}
python=${PYTHON:-python3}
torch=torch==2.13.0 numpy=numpy==2.4.6 psutil=psutil==7.1.0
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
# Every install sees this file, so that no dependency can pull another build of torch in.
echo "$torch" > "$dir/constraints.txt"

# steps PEER: the arguments of one peer's pip installs, one install a line.
steps() {
  case $1 in
    loop) echo "$torch $numpy $psutil" ;;
    pfl) echo "pfl[pytorch]==0.6.0 $torch $numpy scipy==1.17.1 $psutil" ;;
    blazefl)
      echo "$torch $numpy tqdm==4.67.1 $psutil"
      # 3.0.0 declares Python >= 3.14; backport_blazefl below makes it load on 3.11.
      echo "--no-deps --ignore-requires-python blazefl==3.0.0" ;;
    fedjax)
      # JAX 0.4.30 because fedjax is slower with 0.4.38 (another CPU runtime) and does not load with 0.7.2.
      echo "fedjax==0.0.17 jax==0.4.30 jaxlib==0.4.30 dm-haiku==0.0.12 optax==0.2.3 chex==0.1.86" \
        "numpy==1.26.4 scipy==1.17.1 $psutil" ;;
    flwr) echo "flwr[simulation]==1.41.0 $torch $numpy $psutil" ;;
    robust)
      echo "flwr==1.41.0 $torch $numpy scipy==1.17.1 matplotlib==3.11.2 seaborn==0.13.2 $psutil"
      # byzfl asks for torchvision, which would bring a CUDA build; stub_torchvision below stands in for it.
      echo "--no-deps byzfl==0.0.11" ;;
    *) return 1 ;;
  esac
}

site() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

# Written for 3.14, blazefl leaves annotations unevaluated and has two functions in 3.12's syntax `def f[T](...)`.
# With the __future__ import and an ordinary TypeVar all of it runs, otherwise unchanged, on 3.11.
backport_blazefl() {
  local package
  package=$(site "$1")/blazefl
  find "$package" -name '*.py' -size +0 -exec sed -i '1i from __future__ import annotations' {} +
  sed -i -E 's/^def (process_tensors_in_object|reconstruct_from_shared_memory)\[T\]/def \1/
             s/^from typing import Any, Literal$/from typing import Any, Literal, TypeVar\n\nT = TypeVar("T")/' \
    "$package/core/utils.py"
}

# byzfl uses torchvision only to load image data sets, which its aggregators never do, but builds transforms on import.
stub_torchvision() {
  printf 'from unittest.mock import MagicMock\n\ndatasets = transforms = MagicMock()  # a stand-in, see setup.sh\n' \
    > "$(site "$1")/torchvision.py"
}

smoke() {
  case $1 in
    loop) echo "import torch, numpy, psutil" ;;
    pfl) echo "import pfl.model.pytorch, psutil" ;;
    blazefl) echo "import blazefl.contrib, psutil" ;;
    fedjax) echo "import fedjax, psutil" ;;
    flwr) echo "import flwr.simulation, ray, torch, psutil" ;;
    robust) echo "import byzfl, flwr, torch, numpy" ;;
  esac
}

build() {
  local peer=$1 venv=$dir/$1 line
  "$python" -m venv --clear "$venv" || return 1
  while read -r line; do
    # shellcheck disable=SC2086  # a line is several arguments
    "$venv/bin/python" -m pip install -q --disable-pip-version-check -c "$dir/constraints.txt" $line || return 1
  done < <(steps "$peer")
  case $peer in
    blazefl) backport_blazefl "$venv" || return 1 ;;
    robust) stub_torchvision "$venv" || return 1 ;;
  esac
  "$venv/bin/python" -c "$(smoke "$peer")"
}

status=0
for peer in $peers; do
  if ! wanted=$(steps "$peer"); then
    echo "$peer: no such peer" >&2
    status=1
  elif [ "$(cat "$dir/$peer/.made-from" 2>/dev/null)" = "$wanted" ]; then
    echo "$peer: ready"
  elif build "$peer" > "$dir/$peer.log" 2>&1; then
    echo "$wanted" > "$dir/$peer/.made-from"
    echo "$peer: made"
  else
    echo "$peer: FAILED: $(grep -v '^$' "$dir/$peer.log" | tail -n 1) (all of it: $dir/$peer.log)" >&2
    status=1
  fi
done
exit $status
