{{- define "triton-sam3.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "triton-sam3.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "triton-sam3.labels" -}}
{{ include "triton-sam3.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{- define "triton-sam3.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{/*
Bytes of /dev/shm, through which Triton exchanges tensors with the Python models' processes; it grows
and never shrinks. Per image: its three embeddings, 4·(256·E² + 32·(4E)² + 64·(2E)²) = 4096·E² bytes,
and its pixels from the reader, 3·(14E)² = 588·E². Per object: its mask input and three masks at the
decoder, 4·2·(4E)² = 128·E², and the three again at the writer, 96·E². Twice that, as regions fragment
and one execution's responses leave while the next one's requests arrive, and 64 MiB for the rest.
*/}}
{{- define "triton-sam3.shmBytes" -}}
{{- with .Values.shm -}}
{{- $image := add 4684 (mul 224 (int64 .objects)) -}}
{{- add 67108864 (mul 2 (int64 .images) (int64 .grid) (int64 .grid) $image) -}}
{{- end -}}
{{- end -}}

{{- define "triton-sam3.podSecurity" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  {{- if .root.Values.fixedUserIds }}
  runAsUser: {{ .user }}
  runAsGroup: {{ .user }}
  fsGroup: {{ .user }}
  {{- end }}
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- end -}}

{{/* Spread new pods over nodes and zones; the pods that they replace do not count. */}}
{{- define "triton-sam3.spread" -}}
{{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
- maxSkew: 1
  topologyKey: {{ . }}
  whenUnsatisfiable: ScheduleAnyway
  matchLabelKeys: [pod-template-hash]
  labelSelector:
    matchLabels: {{- include "triton-sam3.selector" $ | nindent 6 }}
{{- end }}
{{- end -}}

{{- define "triton-sam3.containerSecurity" -}}
securityContext:
  readOnlyRootFilesystem: true
  allowPrivilegeEscalation: false
  privileged: false
  capabilities:
    drop: [ALL]
{{- end -}}

{{/* A probe is a command in the container: a canary inference, see docker/entrypoint/probes.py. */}}
{{- define "triton-sam3.probe" -}}
exec:
  command:
    - python3
    - -m
    - docker.entrypoint
    - probe
    - {{ .question }}
    - --timeout={{ .probes.timeoutSeconds }}
periodSeconds: {{ .period }}
timeoutSeconds: {{ add .probes.timeoutSeconds 5 }}
{{- end -}}

{{/* Convert a memory quantity such as 4Gi to bytes. */}}
{{- define "triton-sam3.bytes" -}}
{{- $units := dict "" 1 "k" 1000 "M" 1000000 "G" 1000000000 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 -}}
{{- $number := regexFind "^[0-9]+" . -}}
{{- mul ($number | int64) (index $units (trimPrefix $number .)) -}}
{{- end -}}

{{/* A policy sees the pod's port, not the service's: OpenShift's DNS listens on 5353. */}}
{{- define "triton-sam3.egressToDns" -}}
- {{- with .Values.networkPolicy.dns }}
  to: {{- toYaml . | nindent 4 }}
  {{- end }}
  ports:
    - {protocol: UDP, port: 53}
    - {protocol: TCP, port: 53}
    - {protocol: UDP, port: 5353}
    - {protocol: TCP, port: 5353}
{{- end -}}
