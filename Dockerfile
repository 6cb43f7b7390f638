# hobbit's command in an image: docs/platforms.md says how it is used, and that it has not been built yet.
FROM python:3.11-slim AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential cmake ninja-build \
    && rm -rf /var/lib/apt/lists/*
# llama.cpp is compiled here, for this processor unless CMAKE_ARGS=-DGGML_NATIVE=OFF.
ARG CMAKE_ARGS=""
RUN python -m venv /opt/hobbit
# On its own, so that a change of hobbit's sources does not compile llama.cpp again.
COPY pyproject.toml /src/
RUN grep -o 'llama-cpp-python==[0-9.]*' /src/pyproject.toml | sort -u > /src/pinned.txt \
    && /opt/hobbit/bin/pip install --no-cache-dir -r /src/pinned.txt "scikit-build-core>=0.11" "cffi>=1.17"
COPY . /src
# Without isolation: built against the llama.cpp that runs later.
RUN /opt/hobbit/bin/pip install --no-cache-dir --no-build-isolation "/src[plot]"

FROM python:3.11-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home hobbit \
    && install -d -o hobbit /cache
COPY --from=build /opt/hobbit /opt/hobbit
ENV PATH=/opt/hobbit/bin:$PATH HOBBIT_CACHE=/cache
VOLUME /cache
USER hobbit
ENTRYPOINT ["hobbit"]
CMD ["--help"]
