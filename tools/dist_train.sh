#!/bin/sh
# tools/train.py in several processes of this machine, one a GPU: tools/dist_train.sh CONFIG PROCESSES [OPTIONS of train.py]
# More machines: call torchrun with --nnodes, --node-rank and --master-addr as below.
set -e
if [ $# -lt 2 ]; then
    echo "usage: $0 CONFIG PROCESSES [OPTIONS of tools/train.py]" >&2
    exit 2
fi
config=$1 processes=$2
case $processes in
    "" | *[!0-9]* | 0*)
        echo "$0: PROCESSES must be a number from 1 on, got $processes" >&2
        exit 2
        ;;
esac
shift 2
exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc-per-node "$processes" \
    "$(dirname "$0")/train.py" "$config" --launcher pytorch "$@"
