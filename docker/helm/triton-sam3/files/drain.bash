# Before SIGTERM, at which Envoy ends at once and cuts off what it does. Its image has bash, no curl.
# $1: seconds to be forgotten in.
admin() {
  exec 3<>/dev/tcp/127.0.0.1/9901
  printf '%s HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n' "$1" >&3
  cat <&3
}
# From now on it is not ready, and every answer ends its connection; new ones are still taken.
admin 'POST /healthcheck/fail'
sleep "$1" # for the service, and balancers before it, to forget this pod
for _ in {1..120}; do
  [[ $(admin 'GET /stats?filter=^http\.sam3\.downstream_rq_active$') == *'active: 0'* ]] && exit
  sleep 1
done
