# The image of a training node: dtrain and its examples, installed from the wheel, run as nobody.
#
#   docker build -t dtrain .
#   docker run --rm dtrain dtrun --standalone --nproc-per-node 2 examples/train_gpt.py

FROM python:3.13-slim-trixie AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY dtrain dtrain
COPY launcher launcher
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.13-slim-trixie
ARG VERSION=unknown
LABEL org.opencontainers.image.title="dtrain" \
      org.opencontainers.image.description="Distributed training that speaks PyTorch's API, on NumPy and ZeroMQ" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"

# A C compiler, for kernels compiled at run time. The distribution's own fixes are wanted, so its
# versions are not pinned; the base image's tag is.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*

COPY --from=build /wheels /wheels
# A new volume at /checkpoints takes over its mode: any user may be the one who trains.
RUN pip install --no-cache-dir /wheels/*.whl \
 && useradd --uid 1000 --create-home dtrain \
 && install --directory --mode 1777 /checkpoints

COPY examples /home/dtrain/examples
USER 1000:1000
WORKDIR /home/dtrain
ENV PYTHONUNBUFFERED=1
CMD ["dtrun", "--help"]
