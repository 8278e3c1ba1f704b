#!/usr/bin/env bash
# A sweep on Slurm: Ray's head and the sweep on the first node of the job, workers on the others.
# Costs, failures, security: docs/cluster.md.
#
# Never run on a Slurm cluster by its authors. Checked: with stand-ins for srun, squeue
# and scontrol, this script, Ray and a sweep through warning, requeue and end
# (tests/test_cluster_slurm.py).
#
# Edit first: the lines marked EDIT. Once, in the project's folder, on the file system that all nodes
# share:
#   python3.11 -m venv .venv && .venv/bin/pip install -c constraints.txt -e .
# Then, and again after a failure (a sweep goes on where it was):
#   sbatch clusters/slurm.sh sweeps/imagenette.yaml dataset.root=/data/imagenette
#
# Five minutes before the time limit the sweep gets SIGTERM, saves its state and ends, and the job
# puts itself back into the queue, where it goes on: in the same place, with the same experts. A
# preempted job is put back by Slurm. `scancel JOB` ends it; submitted again, it goes on, too.

#SBATCH --job-name=ftd-ray
#SBATCH --nodes=2                       # EDIT
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16              # EDIT
#SBATCH --gpus-per-node=4               # EDIT: 0, or without the line, for CPUs only
#SBATCH --mem=120G                      # EDIT
#SBATCH --time=12:00:00                 # EDIT
#SBATCH --partition=my-partition        # EDIT
#SBATCH --signal=B:TERM@300             # to this script, which passes it on
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=ftd-ray-%j.log
set -euo pipefail

project=${FTD_PROJECT:-$SLURM_SUBMIT_DIR}               # EDIT: where .venv is
shared=${FTD_SHARED:-$project/shared}                   # EDIT: seen by all nodes: store and runs
scratch=${FTD_SCRATCH:-${SLURM_TMPDIR:-/tmp}}           # EDIT: a disk of each node's own; a short path
sweep=${1:?"usage: sbatch slurm.sh SWEEP.yaml [key.path=value ...]"}
shift

# What is decoded once for a node, and C kernels compiled for its processor: on its own disk. A
# network file system is slow for the first and may hold another processor's for the second.
export FTD_CACHE="$scratch/ftd-cache-$USER"
# Nobody else on these nodes may join, and the token is of this run's own.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN
export PATH="$project/.venv/bin:$PATH"

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((20000 + SLURM_JOB_ID % 10000))  # jobs that share a node do not meet
address=$(srun --overlap --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" \
    python -c 'import ray; print(ray.util.get_node_ip_address())'):$port
temporary="$scratch/ray-$SLURM_JOB_ID"
cpus=${SLURM_CPUS_PER_TASK:?"say --cpus-per-task: Ray would take all of a node for its own"}
gpus=${SLURM_GPUS_ON_NODE:-0}
# Its memory is the job's share, not the node's; a third of it holds Ray's objects.
memory=$((${SLURM_MEM_PER_NODE:-8192} * 1024 * 1024))

raylet() {  # NODE, then what to say to `ray start`
    local node=$1
    shift
    srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" --cpus-per-task="$cpus" \
        ray start --block --disable-usage-stats --num-cpus="$cpus" --num-gpus="$gpus" \
        --memory="$((memory * 2 / 3))" --object-store-memory="$((memory / 3))" "$@" &
    steps+=($!)
}

steps=()
driver=
stopped=
# shellcheck disable=SC2317  # the trap calls it
finish() {
    local step
    for step in "${steps[@]}"; do
        kill -TERM "$step" 2>/dev/null || true
    done
    wait "${steps[@]}" 2>/dev/null || true
    rm -rf "$temporary"
}
trap finish EXIT
trap 'stopped=yes; [ -z "$driver" ] || kill -TERM "$driver" 2>/dev/null || true' TERM

raylet "${nodes[0]}" --head --node-ip-address="${address%:*}" --port="$port" \
    --include-dashboard=false --temp-dir="$temporary"
for node in "${nodes[@]:1}"; do
    raylet "$node" --address="$address"
done

# Waits until all nodes are there; `ray status` says what it waits for.
for _ in $(seq 60); do
    if [ -n "$stopped" ]; then
        break
    fi
    joined=$(python -c "
import ray
ray.init(address='$address', log_to_driver=False, logging_level='error')
print(sum(node['Alive'] for node in ray.nodes()))" 2>/dev/null || echo 0)
    if [ "$joined" -ge "${#nodes[@]}" ]; then
        break
    fi
    sleep 5
done

code=143
if [ -z "$stopped" ]; then
    if [ "${joined:-0}" -lt "${#nodes[@]}" ]; then
        echo "slurm.sh: of ${#nodes[@]} nodes only ${joined:-0} joined within five minutes" >&2
        exit 1
    fi
    python -m ftd_ray.sweep "$sweep" --resume --address "$address" \
        store.uri="$shared/store" output.dir="$shared/runs/$(basename "$sweep" .yaml)" \
        tracking.uri="sqlite:///$shared/mlflow.db" "$@" &
    driver=$!
    code=0
    wait "$driver" || code=$?
    while kill -0 "$driver" 2>/dev/null; do  # `wait` ends with the signal, the sweep a bit later
        code=0
        wait "$driver" || code=$?
    done
fi
# Still running, so it is not being cancelled or preempted: the time limit is near.
if [ -n "$stopped" ] && [ "$code" -ne 0 ] &&
    [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
    echo "slurm.sh: stopped with its state saved; the job goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
