# The two commands of the README, in an image:
#   docker build -t lit_gen . && docker run --rm -v lit_gen_runs:/home/lit_gen/app/runs" lit_gen        # trains
#   docker build --target test -t lit_gen:test . && docker run --rm lit_gen:test                      # pytest
# On a GPU (the driver is the host's):
#   docker build --build-arg BASE=nvidia/cuda:12.8.1-base-ubuntu24.04 \
#     --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 -t lit_gen:cuda .
#   docker run --rm --gpus all --shm-size 8g -v lit_gen_runs:/home/lit_gen/app/runs" lit_gen:cuda
# Add options of a training after `python -m lit_gen.train`, as in `docker run ... python -m lit_gen.train experiment=digits_edm`.
ARG BASE=ubuntu:24.04
FROM ${BASE} AS base
# The versions are those of the base image.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv gcc libc6-dev python3-dev git \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 10001 lit_gen && install -d -o lit_gen /home/lit_gen/app /home/lit_gen/app/runs
USER 10001
WORKDIR /home/lit_gen/app
ENV PATH=/home/lit_gen/app/.venv/bin:$PATH WANDB_MODE=offline
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python3 -m venv .venv && pip install --no-cache-dir --index-url ${TORCH_INDEX} "torch>=2.8" "torchvision>=0.23"
COPY --chown=lit_gen . .

FROM base AS test
RUN pip install --no-cache-dir -e ".[test]"
CMD ["pytest"]

FROM base AS train
RUN pip install --no-cache-dir -e .
CMD ["python", "-m", "lit_gen.train"]
