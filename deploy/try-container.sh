#!/usr/bin/env bash
# Try the image and the compose file for real, also where no image registry can be reached.
#
#     deploy/try-container.sh images    make stand-ins for the images that would be pulled (root, debootstrap, .venv)
#     deploy/try-container.sh try       build, start, predict, label, kill, restart, stop; throws its volumes away
#
# The stand-ins: Debian's Python for python:3.11-slim; Apache Kafka's own jars, laid out as in apache/kafka and set up by
# its own KafkaDockerWrapper; Debian's Prometheus for prom/prometheus. Without `images`, `try` pulls the real ones.
set -euo pipefail
cd "$(dirname "$0")/.."
export COMPOSE_PROJECT_NAME=streamlearn-try
readonly MARK=airgapped KAFKA=4.3.0
readonly URL=http://127.0.0.1:${HTTP_PORT:-8080}

base_image() {
    local root=$1/root
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$root" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"}
    # A company's own certificate authority comes along, or pip would not trust its proxy.
    cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
    rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
    tar -C "$root" -c . | docker import -c 'CMD ["python3"]' - $MARK/python:3.11-slim
    rm -rf "$root"
}

prometheus_image() {
    docker build -t $MARK/prometheus - <<EOF
FROM $MARK/python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends prometheus && rm -rf /var/lib/apt/lists/* \
 && mkdir -p /prometheus && chown 65534:65534 /prometheus
USER 65534:65534
WORKDIR /prometheus
ENTRYPOINT ["prometheus", "--storage.tsdb.path=/prometheus"]
CMD ["--config.file=/etc/prometheus/prometheus.yml"]
EOF
}

kafka_image() {
    local folder=$1/kafka
    mkdir -p "$folder/libs" "$folder/docker" "$folder/bin"
    .venv/bin/python - "$folder/libs" <<EOF
import pathlib, shutil, sys
import jgo
artefacts = [f"org.apache.kafka:{name}:$KAFKA" for name in ("kafka_2.13", "kafka-tools")]
for jar in jgo.build("+".join(artefacts)).all_jars:
    shutil.copy(jar, pathlib.Path(sys.argv[1]))
EOF
    cat >"$folder/docker/server.properties" <<EOF
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@localhost:9093
controller.listener.names=CONTROLLER
listeners=PLAINTEXT://:9092,CONTROLLER://:9093
log.dirs=/var/lib/kafka/data
EOF
    cat >"$folder/docker/log4j2.yaml" <<EOF
Configuration: {Loggers: {Root: {level: WARN}}}
EOF
    cp "$folder/docker/log4j2.yaml" "$folder/docker/tools-log4j2.yaml"
    cat >"$folder/docker/run" <<'EOF'
#!/bin/bash
set -e
export CLUSTER_ID=${CLUSTER_ID:-5L6g3nShT-eMCtK--X86sw}
# As the real image has it: a volume that was formatted by an earlier start is no error.
result=$(java -cp '/opt/kafka/libs/*' kafka.docker.KafkaDockerWrapper setup --default-configs-dir /etc/kafka/docker \
    --mounted-configs-dir /mnt/shared/config --final-configs-dir /opt/kafka/config 2>&1) \
    || grep --quiet "already formatted" <<<"$result" || { echo "$result"; exit 1; }
exec java ${KAFKA_HEAP_OPTS:--Xms1G -Xmx1G} -cp '/opt/kafka/libs/*' kafka.Kafka /opt/kafka/config/server.properties
EOF
    printf '#!/bin/bash\nexec java -cp "/opt/kafka/libs/*" org.apache.kafka.tools.ConsoleProducer "$@"\n' \
        >"$folder/bin/kafka-console-producer.sh"
    chmod +x "$folder"/bin/* "$folder/docker/run"
    docker build -t $MARK/kafka:$KAFKA -f - "$folder" <<EOF
FROM $MARK/python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends openjdk-17-jre-headless && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 1000 --user-group --create-home --shell /bin/bash appuser
COPY libs /opt/kafka/libs
COPY bin /opt/kafka/bin
COPY docker /etc/kafka/docker
RUN mkdir -p /var/lib/kafka/data /mnt/shared/config /opt/kafka/config \
 && chown -R appuser:appuser /var/lib/kafka /etc/kafka /mnt/shared/config /opt/kafka
USER appuser
VOLUME /var/lib/kafka/data
CMD ["/etc/kafka/docker/run"]
EOF
}

images() {
    local folder
    folder=$(mktemp -d)
    # shellcheck disable=SC2064 # the folder of now is meant
    trap "rm -rf '$folder'" EXIT
    base_image "$folder"
    prometheus_image
    kafka_image "$folder"
}

say() { printf '\n== %s\n' "$*"; }

# until_true SECONDS COMMAND…: one try a second, then give up.
until_true() {
    local tries=$1
    shift
    for _ in $(seq "$tries"); do
        if "$@" >/dev/null 2>&1; then return; fi
        sleep 1
    done
    say "gave up after $tries s: $*"
    docker compose logs --tail 30 streamlearn
    return 1
}

ask() { curl --fail-with-body --silent --show-error --max-time 10 --header 'Content-Type: application/json' "$@"; }
sample() { .venv/bin/python -c 'from sklearn.datasets import load_digits; print(load_digits().data[7].tolist())'; }
version() { ask "$URL/model" | .venv/bin/python -c 'import json, sys; print(json.load(sys.stdin)["model_version"])'; }
logged() { docker compose logs --no-log-prefix streamlearn | grep "\"event\": \"$1\""; }
step_of() { logged "$1" | tail -1 | .venv/bin/python -c 'import json, sys; print(json.load(sys.stdin)["step"])'; }
trained() { ask "$URL/label/$1" | grep -q '"state":"trained"'; }
past() { [ "$(version)" -gt "$1" ]; }
resumed() { [ "$(step_of learner_started)" -gt 0 ]; }
scraped() { ask "http://127.0.0.1:${PROMETHEUS_PORT:-9090}/api/v1/query?query=streamlearn_steps_total" | grep -q '"process":"learner"'; }

try() {
    if docker image inspect $MARK/python:3.11-slim >/dev/null 2>&1; then
        export PYTHON_IMAGE=$MARK/python:3.11-slim KAFKA_IMAGE=$MARK/kafka:$KAFKA PROMETHEUS_IMAGE=$MARK/prometheus
    fi
    local compose="docker compose --profile simulate --profile monitoring" before
    # shellcheck disable=SC2064 # the command of now is meant
    trap "$compose down --volumes --timeout 60" EXIT
    say "build"
    docker compose build
    say "up, with a stream of digits and Prometheus"
    $compose up --detach
    until_true 120 ask "$URL/health/ready"
    say "predict, and let it learn from the sample"
    ask "$URL/predict?learn=true" --data "{\"instances\": [$(sample)], \"ids\": [\"try-1\"]}"
    say "label it, and see the label used"
    ask "$URL/label" --data '{"id": "try-1", "label": "7"}'
    until_true 30 trained try-1
    ask "$URL/label/try-1"
    say "a record of a foreign client: Kafka's own console producer"
    printf 'try-2;{"x": %s}\n' "$(sample)" | docker compose exec -T kafka /opt/kafka/bin/kafka-console-producer.sh \
        --bootstrap-server kafka:19092 --topic samples --property parse.key=true --property 'key.separator=;'
    ask "$URL/label" --data '{"id": "try-2", "label": "7"}'
    until_true 30 trained try-2
    say "Prometheus sees the learner through a server"
    until_true 60 scraped
    say "kill -9 of the whole container, then start: it resumes"
    until_true 60 logged checkpoint_saved
    before=$(version)
    docker compose kill --signal KILL streamlearn
    docker compose up --detach
    until_true 120 past "$before"
    until_true 60 trained try-1
    # Servers are there before the learner is, and answer with what was published between `before` and the kill.
    until_true 60 resumed
    say "SIGTERM: it saves and exits with 0, and the next start begins at the step that it stopped at"
    docker compose stop streamlearn
    [ "$(docker inspect --format '{{.State.ExitCode}}' "$(docker compose ps --all --quiet streamlearn)")" = 0 ]
    before=$(step_of learner_stopped)
    docker compose up --detach
    until_true 120 past "$before"
    [ "$(step_of learner_started)" = "$before" ]
    ask "$URL/model"
    say "all went well"
}

case ${1:-} in
images | try) "$1" ;;
*) sed -n '2,8p' "$0"; exit 2 ;;
esac
