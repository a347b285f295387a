# crcjax-edge: predicts exported models with ONNX Runtime, without JAX (docs/export.md). build.sh gives the wheels and arguments.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE} AS build
COPY wheels /wheels
COPY edge.txt /wheels/edge.txt
RUN python3 -m venv /opt/crcjax \
 && /opt/crcjax/bin/pip install --no-cache-dir --no-index --find-links /wheels --requirement /wheels/edge.txt \
 && /opt/crcjax/bin/pip install --no-cache-dir --no-index --find-links /wheels --no-deps crcjax-edge \
 && /opt/crcjax/bin/pip uninstall --yes pip setuptools

FROM ${BASE}
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="crcjax-edge" \
      org.opencontainers.image.description="Predicts exported models of crcjax. Research software, not a medical device." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /opt/crcjax /opt/crcjax
COPY sbom.json /opt/crcjax/sbom.json
ENV PATH=/opt/crcjax/bin:/usr/local/bin:/usr/bin:/bin HOME=/tmp PYTHONDONTWRITEBYTECODE=1 MPLCONFIGDIR=/tmp
USER 10001:10001
WORKDIR /tmp
ENTRYPOINT ["crcjax"]
CMD ["--help"]
