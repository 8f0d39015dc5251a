{{/* The pods that compute models: a server, and what follows one on another machine. */}}

{{/* How many machines a model is computed on; empty: each on one. */}}
{{- define "loraplex.machines" -}}
{{- range .Values.models -}}{{- if gt (int (default 1 .machines)) 1 -}}{{- .machines -}}{{- end -}}{{- end -}}
{{- end -}}

{{- define "loraplex.followerSelector" -}}
app.kubernetes.io/name: {{ include "loraplex.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: follower
{{- end -}}

{{/* What these pods have in common: who they run as, and where. */}}
{{- define "loraplex.podOnDevices" -}}
serviceAccountName: {{ include "loraplex.serviceAccount" . }}
automountServiceAccountToken: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- if and .Values.gpu.enabled .Values.gpu.runtimeClassName }}
runtimeClassName: {{ .Values.gpu.runtimeClassName }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: { type: RuntimeDefault }
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.topologySpreadConstraints }}
topologySpreadConstraints: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "loraplex.resources" -}}
{{- $resources := deepCopy .Values.resources }}
{{- if .Values.gpu.enabled }}
{{- range $side := list "limits" "requests" }}
{{- $_ := set $resources $side (merge (dict $.Values.gpu.resource $.Values.gpu.count) (default dict (get $resources $side))) }}
{{- end }}
{{- end }}
{{- toYaml $resources }}
{{- end -}}

{{- define "loraplex.homes" -}}
- { name: HOME, value: /var/cache/loraplex }
- name: HF_HOME
  value: {{ if .Values.persistence.models.enabled }}{{ .Values.persistence.models.mountPath }}/hub{{ else }}/var/cache/loraplex/hub{{ end }}
{{- end -}}

{{- define "loraplex.scratchMounts" -}}
- { name: scratch, mountPath: /tmp, subPath: tmp }
- { name: scratch, mountPath: /var/cache/loraplex, subPath: cache }
- { name: shared-memory, mountPath: /dev/shm }
{{- end -}}

{{- define "loraplex.scratchVolumes" -}}
- name: scratch
  emptyDir: { sizeLimit: {{ .Values.scratch }} }
- name: shared-memory
  emptyDir: { medium: Memory, sizeLimit: {{ .Values.sharedMemory }} }
{{- end -}}

{{- define "loraplex.server" -}}
metadata:
  labels:
    {{- include "loraplex.selector" . | nindent 4 }}
    llm-d.ai/engine-type: vllm # by whose names llm-d reads the metrics
    {{- with .Values.podLabels }}{{- toYaml . | nindent 4 }}{{- end }}
  annotations:
    checksum/config: {{ include "loraplex.config" . | sha256sum }}
    {{- with .Values.podAnnotations }}{{- toYaml . | nindent 4 }}{{- end }}
spec:
  {{- include "loraplex.podOnDevices" . | nindent 2 }}
  # The running streams' grace, what comes before it, and time to write the last messages.
  terminationGracePeriodSeconds: {{ add .Values.drain.preStopSeconds .Values.drain.lameDuckSeconds .Values.drain.graceSeconds 15 }}
  containers:
    - name: loraplex
      image: {{ include "loraplex.image" . | quote }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      args: [serve, --config, /etc/loraplex/config/loraplex.yaml]
      env:
        {{- include "loraplex.homes" . | nindent 8 }}
        {{- if or .Values.state.secretName (include "loraplex.machines" .) }}
        - name: POD_IP
          valueFrom: { fieldRef: { fieldPath: status.podIP } }
        {{- end }}
        {{- if include "loraplex.machines" . }}
        - { name: LORAPLEX_MACHINES_LISTEN, value: "$(POD_IP):{{ .Values.ports.machines }}" }
        - { name: LORAPLEX_MACHINES_SECRET, value: /etc/loraplex/machines/{{ .Values.machines.secretKey }} }
        {{- end }}
        {{- with .Values.state.secretName }}
        - name: LORAPLEX_STATE
          valueFrom: { secretKeyRef: { name: {{ . }}, key: {{ $.Values.state.secretKey }} } }
        - { name: LORAPLEX_FLEET_LISTEN, value: "0.0.0.0:{{ $.Values.ports.fleet }}" }
        - { name: LORAPLEX_FLEET_ADDRESS, value: "$(POD_IP):{{ $.Values.ports.fleet }}" }
        {{- if $.Values.tls.enabled }}
        - { name: LORAPLEX_FLEET_SERVER_NAME, value: {{ include "loraplex.fullname" $ }} }
        - { name: LORAPLEX_FLEET_CA, value: /etc/loraplex/tls/ca.crt }
        {{- end }}
        {{- end }}
        {{- with .Values.extraEnv }}{{- toYaml . | nindent 8 }}{{- end }}
      ports:
        {{- $closed := dict "fleet" (not .Values.state.secretName) "machines" (not (include "loraplex.machines" .)) }}
        {{- range $name, $port := .Values.ports }}
        {{- if not (get $closed $name) }}
        - { name: {{ $name }}, containerPort: {{ $port }} }
        {{- end }}
        {{- end }}
        {{- if .Values.http.enabled }}
        - { name: http, containerPort: {{ .Values.http.port }} }
        {{- end }}
      startupProbe: # every model that is to be loaded at start has been
        grpc: { port: {{ .Values.ports.health }}, service: startup }
        {{- toYaml .Values.probes.startup | nindent 8 }}
      livenessProbe: # the service answers, and no engine is given up
        grpc: { port: {{ .Values.ports.health }}, service: liveness }
        {{- toYaml .Values.probes.liveness | nindent 8 }}
      readinessProbe: # new requests are admitted
        grpc: { port: {{ .Values.ports.health }}, service: readiness }
        {{- toYaml .Values.probes.readiness | nindent 8 }}
      lifecycle:
        preStop:
          sleep: { seconds: {{ .Values.drain.preStopSeconds }} }
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities: { drop: [ALL] }
      resources:
        {{- include "loraplex.resources" . | nindent 8 }}
      volumeMounts:
        - { name: config, mountPath: /etc/loraplex/config, readOnly: true }
        {{- include "loraplex.scratchMounts" . | nindent 8 }}
        {{- if include "loraplex.machines" . }}
        - { name: machines, mountPath: /etc/loraplex/machines, readOnly: true }
        {{- end }}
        {{- if .Values.tls.enabled }}
        - { name: tls, mountPath: /etc/loraplex/tls, readOnly: true }
        {{- end }}
        {{- if .Values.auth.keysSecret }}
        - { name: keys, mountPath: /etc/loraplex/keys, readOnly: true }
        {{- end }}
        {{- if .Values.state.secretName }}
        - { name: database, mountPath: /etc/loraplex/state, readOnly: true }
        {{- end }}
        {{- if .Values.auth.jwtSecret }}
        - { name: jwt, mountPath: /etc/loraplex/jwt, readOnly: true }
        {{- end }}
        {{- range $name, $volume := .Values.persistence }}
        {{- if $volume.enabled }}
        - { name: {{ $name }}, mountPath: {{ $volume.mountPath }}, readOnly: {{ $volume.readOnly }} }
        {{- end }}
        {{- end }}
  volumes:
    - name: config
      configMap: { name: {{ include "loraplex.fullname" . }} }
    {{- include "loraplex.scratchVolumes" . | nindent 4 }}
    {{- if include "loraplex.machines" . }}
    - name: machines
      secret: { secretName: {{ .Values.machines.secretName }} }
    {{- end }}
    {{- if .Values.tls.enabled }}
    - name: tls
      secret: { secretName: {{ .Values.tls.secretName }} }
    {{- end }}
    {{- if .Values.auth.keysSecret }}
    - name: keys
      secret: { secretName: {{ .Values.auth.keysSecret }} }
    {{- end }}
    {{- with .Values.state.secretName }}
    - name: database
      secret: { secretName: {{ . }} }
    {{- end }}
    {{- if .Values.auth.jwtSecret }}
    - name: jwt
      secret: { secretName: {{ .Values.auth.jwtSecret }} }
    {{- end }}
    {{- range $name, $volume := .Values.persistence }}
    {{- if $volume.enabled }}
    - name: {{ $name }}
      persistentVolumeClaim: { claimName: {{ include "loraplex.claim" (dict "root" $ "name" $name) }} }
    {{- end }}
    {{- end }}
{{- end -}}

{{/* It has the models and the secret, and neither keys nor state. It outlives the streams of the server that it follows. */}}
{{- define "loraplex.follower" -}}
metadata:
  labels:
    {{- include "loraplex.followerSelector" . | nindent 4 }}
    {{- with .Values.podLabels }}{{- toYaml . | nindent 4 }}{{- end }}
  {{- with .Values.podAnnotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- include "loraplex.podOnDevices" . | nindent 2 }}
  {{- $drain := add .Values.drain.preStopSeconds .Values.drain.lameDuckSeconds .Values.drain.graceSeconds }}
  terminationGracePeriodSeconds: {{ add $drain 15 }}
  containers:
    - name: loraplex
      image: {{ include "loraplex.image" . | quote }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      args: [follow, --port, "{{ .Values.ports.machines }}", --log-level, {{ .Values.logLevel }}]
      env:
        {{- include "loraplex.homes" . | nindent 8 }}
        - name: POD_IP
          valueFrom: { fieldRef: { fieldPath: status.podIP } }
        - { name: LORAPLEX_MACHINES_SECRET, value: /etc/loraplex/machines/{{ .Values.machines.secretKey }} }
        {{- with .Values.extraEnv }}{{- toYaml . | nindent 8 }}{{- end }}
      lifecycle:
        preStop:
          sleep: { seconds: {{ $drain }} }
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities: { drop: [ALL] }
      resources:
        {{- include "loraplex.resources" . | nindent 8 }}
      volumeMounts:
        {{- include "loraplex.scratchMounts" . | nindent 8 }}
        - { name: machines, mountPath: /etc/loraplex/machines, readOnly: true }
        {{- with .Values.persistence.models }}
        {{- if .enabled }}
        - { name: models, mountPath: {{ .mountPath }}, readOnly: {{ .readOnly }} }
        {{- end }}
        {{- end }}
  volumes:
    {{- include "loraplex.scratchVolumes" . | nindent 4 }}
    - name: machines
      secret: { secretName: {{ .Values.machines.secretName }} }
    {{- if .Values.persistence.models.enabled }}
    - name: models
      persistentVolumeClaim: { claimName: {{ include "loraplex.claim" (dict "root" $ "name" "models") }} }
    {{- end }}
{{- end -}}
