# lisa-dist in a container, on CPUs or GPUs:
#
#   docker build -t lisa-dist .
#   docker run --rm --shm-size 16g -v "$PWD:/work" lisa-dist train recipe.yaml
#
# The base needs Python 3.11 or newer and pip. For GPUs: --build-arg BASE=pytorch/pytorch:2.9.1-cuda12.8-cudnn9-devel, and
# docker run --gpus all. It needs no compiler of CUDA's: g++ builds DeepSpeed's AdamW of the host, and kernels are Triton's.
# On CPUs a torch without CUDA is a tenth of the size: --build-arg PIP_ARGS="--extra-index-url URL", of the index of
# torch's CPU builds.
ARG BASE=python:3.12-slim
FROM ${BASE}
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ make \
    && rm -rf /var/lib/apt/lists/*
COPY . /opt/lisa_dist
ARG PIP_ARGS=
RUN pip install --no-cache-dir ${PIP_ARGS} /opt/lisa_dist
# Built once here, and not at the first step of every container.
ENV TORCH_EXTENSIONS_DIR=/opt/torch_extensions
RUN python -c 'from lisa_dist.zero.cpu_ops import build_cpu_ops; build_cpu_ops()'
WORKDIR /work
ENTRYPOINT ["lisa-dist"]
CMD ["--help"]
