# Runs sweeps on one machine.
#
#   docker build -t ftd-ray .
#   mkdir -p work && docker run --rm --init --shm-size=8g -v "$PWD/work:/work" ftd-ray
#   docker run --rm --init --shm-size=16g --gpus all -v "$PWD/work:/work" ftd-ray \
#     /opt/ftd-ray/sweeps/imagenette.yaml --resume
#
# --shm-size  Ray's object store lives in /dev/shm, of which Docker grants 64 MB. Give it about a
#             third of the memory; with less, Ray falls back to the much slower /tmp.
# --gpus all  needs the NVIDIA Container Toolkit on the host, and nothing in here: CUDA comes with
#             PyTorch's wheels.
# --init      reaps the processes that Ray's workers leave, and passes signals on.
# -v          runs, store and mlflow.db are written to /work by user 1000.

FROM python:3.11-slim

# The C compiler builds the CPU kernels for the processor that the container meets.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/ftd-ray
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY ftd ./ftd
COPY ftd_ray ./ftd_ray
RUN pip install --no-cache-dir -c constraints.txt .
# After the install, so that editing a sweep does not repeat it.
COPY sweeps ./sweeps

RUN useradd --create-home --uid 1000 ftd && install -d -o ftd -g ftd /work
USER ftd
WORKDIR /work
VOLUME /work

# Ray's default differs between versions; a local cluster makes its own token.
# There is no git in here, and MLflow need not say so.
ENV RAY_AUTH_MODE=token \
    GIT_PYTHON_REFRESH=quiet

ENTRYPOINT ["python", "-m", "ftd_ray.sweep"]
CMD ["/opt/ftd-ray/sweeps/digits.yaml"]
