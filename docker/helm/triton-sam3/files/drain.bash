# Runs before SIGTERM, on which Envoy exits at once and cuts off its requests. Its image has bash
# but no curl. $1: seconds for clients to stop finding this pod.
admin() {
  exec 3<>/dev/tcp/127.0.0.1/9901
  printf '%s HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n' "$1" >&3
  cat <&3
}
# From now on it is not ready, and responses close their connections; new ones are accepted.
admin 'POST /healthcheck/fail'
sleep "$1" # for the service, and load balancers in front of it, to drop this pod
for _ in {1..120}; do
  [[ $(admin 'GET /stats?filter=^http\.sam3\.downstream_rq_active$') == *'active: 0'* ]] && exit
  sleep 1
done
