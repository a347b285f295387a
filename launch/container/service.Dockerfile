# The service: API, page, queue and workers on CPUs (docs/service.md). build.sh gives the wheels and arguments.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE} AS build
COPY wheels /wheels
COPY service.txt /wheels/service.txt
RUN python3 -m venv /opt/crcjax \
 && /opt/crcjax/bin/pip install --no-cache-dir --no-index --find-links /wheels --requirement /wheels/service.txt \
 && /opt/crcjax/bin/pip install --no-cache-dir --no-index --find-links /wheels --no-deps crcjax \
 && /opt/crcjax/bin/pip uninstall --yes pip setuptools

FROM ${BASE}
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="crcjax-service" \
      org.opencontainers.image.description="The service of crcjax. Research software, not a medical device." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /opt/crcjax /opt/crcjax
COPY sbom.json /opt/crcjax/sbom.json
ENV PATH=/opt/crcjax/bin:/usr/local/bin:/usr/bin:/bin HOME=/tmp PYTHONDONTWRITEBYTECODE=1 MPLCONFIGDIR=/tmp
USER 10001:10001
WORKDIR /tmp
EXPOSE 8443
ENTRYPOINT ["crcjax", "serve"]
CMD ["--help"]
