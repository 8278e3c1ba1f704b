# syntax=docker/dockerfile:1
# Everything that a sweep needs: to run one here, and as the image of Ray's cluster files.
#
#   docker build -t ftd-ray .                                # CUDA, which runs on CPUs, too
#   docker build -t ftd-ray:cpu --build-arg VARIANT=cpu .    # 3 GB smaller, for CPUs only
#
#   mkdir -p work && docker run --rm --init --shm-size=8g -v "$PWD/work:/work" ftd-ray
#   docker run --rm --init --shm-size=16g --gpus all -v "$PWD/work:/work" ftd-ray \
#     /opt/ftd-ray/sweeps/imagenette.yaml --resume
#   docker run --rm -it ftd-ray bash                         # or ray, python, mlflow
#
# --shm-size  Ray's object store lives in /dev/shm, of which Docker grants 64 MB. Give it about a
#             third of the memory; with less, Ray falls back to the much slower /tmp.
# --gpus all  needs the NVIDIA Container Toolkit and driver 580 on the host, and nothing in here:
#             CUDA comes with PyTorch's wheels.
# --init      reaps the processes that Ray's workers leave, and passes signals on.
# -v          runs, store and mlflow.db are written to /work by user 1000.
#
# Never built with Docker by its authors: a test runs these very steps in a fresh Debian root
# (tests/test_cluster_image.py).

ARG BASE=python:3.11.15-slim-bookworm

FROM ${BASE} AS build
ARG VARIANT=cuda
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PATH=/opt/venv/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /opt/ftd-ray
# setuptools for `pip install --no-build-isolation` of a checkout, where this is Ray's image.
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/venv && pip install "setuptools>=77"
# Before the code, so that editing it repeats nothing of this. The CPU variant's two wheels come
# from PyTorch's index, both of them: one of there does not fit one of elsewhere.
COPY constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    case "$VARIANT" in \
        cuda) pip install -c constraints.txt torch torchvision ;; \
        cpu) grep -E "^(torch|torchvision)==" constraints.txt > /tmp/torch.txt \
            && pip install --index-url "$TORCH_INDEX" -r /tmp/torch.txt ;; \
        *) echo "VARIANT is cuda or cpu, not $VARIANT" >&2; exit 1 ;; \
    esac
COPY pyproject.toml README.md LICENSE ./
COPY ftd ./ftd
COPY ftd_ray ./ftd_ray
# boto3 is for the head of a cluster: Ray's autoscaler, and MLflow's artifacts in a bucket.
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c constraints.txt . boto3

FROM ${BASE}
# gcc builds the CPU kernels for the processor that the container meets. The rest is what Ray's
# launcher wants of an image: files come by rsync, workers are reached by ssh, `ray attach` is tmux.
RUN apt-get update && apt-get install -y --no-install-recommends \
        gcc libc6-dev openssh-client procps rsync tmux \
    && rm -rf /var/lib/apt/lists/*
# User 1000, as on the hosts that mount their files in here. Launchers run login shells, which forget
# the PATH of an image.
RUN useradd --create-home --uid 1000 --shell /bin/bash ray \
    && install -d -o ray -g ray /work \
    && echo 'export PATH=/opt/venv/bin:$PATH' > /etc/profile.d/ftd-ray.sh
COPY --from=build --chown=ray:ray /opt/venv /opt/venv
COPY sweeps /opt/ftd-ray/sweeps
COPY clusters /opt/ftd-ray/clusters
COPY clusters/entrypoint.sh /usr/local/bin/ftd-ray

# HOME because Ray's launcher reads it here. Token: Ray's default differs between versions. There is
# no git in here, and MLflow need not say so.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/home/ray \
    RAY_AUTH_MODE=token \
    GIT_PYTHON_REFRESH=quiet
USER ray
WORKDIR /work
VOLUME /work

ENTRYPOINT ["ftd-ray"]
CMD ["/opt/ftd-ray/sweeps/digits.yaml"]
