{{/*
Envoy's static configuration: consistent hashing on the metadata `loraplex-routing-key`, so that an adapter's requests
meet the replica that holds it, with bounded load, so that a hot one spreads. What fails before its first message is
tried on another replica.
*/}}
{{- define "loraplex.envoyConfig" -}}
{{- $envoy := .Values.envoy -}}
admin:
  address:
    socket_address: { address: 127.0.0.1, port_value: {{ $envoy.adminPort }} }
static_resources:
  listeners:
    - name: grpc
      address:
        socket_address: { address: {{ $envoy.bindAddress }}, port_value: {{ $envoy.port }} }
      filter_chains:
        - filters:
            - name: envoy.filters.network.http_connection_manager
              typed_config:
                "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
                stat_prefix: loraplex
                codec_type: AUTO
                stream_idle_timeout: 3600s # a stream may wait long for its first token; its caller sets the deadline
                request_headers_timeout: 10s
                http2_protocol_options: { max_concurrent_streams: 1024 }
                common_http_protocol_options: { max_headers_count: 100 }
                max_request_headers_kb: 32
                route_config:
                  virtual_hosts:
                    - name: loraplex
                      domains: ["*"]
                      {{- if $envoy.callsPerSecondPerAddress }}
                      rate_limits:
                        - actions: [{ remote_address: {} }]
                      {{- end }}
                      routes:
                        - match: {{ ternary "{ prefix: /, grpc: {} }" "{ prefix: /loraplex.v1. }" (not (empty .Values.dialects)) }}
                          route:
                            cluster: replicas
                            timeout: 0s # as above
                            hash_policy:
                              - header: { header_name: loraplex-routing-key }
                                terminal: true
                              - header: { header_name: loraplex-adapter } # of callers that give no key
                                terminal: true
                            retry_policy:
                              retry_on: connect-failure,refused-stream,reset,unavailable
                              num_retries: 3
                              retry_host_predicate:
                                - name: envoy.retry_host_predicates.previous_hosts
                                  typed_config:
                                    "@type": type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate
                              host_selection_retry_max_attempts: 8
                              retry_back_off: { base_interval: 0.025s, max_interval: 0.25s }
                        - match: { prefix: /grpc. } # health and reflection
                          route: { cluster: replicas, timeout: 0s }
                        {{- if include "loraplex.httpBehindEnvoy" . }}
                        {{- include "loraplex.pickerHttpRoute" . | nindent 24 }}
                        {{- end }}
                http_filters:
                  - name: envoy.filters.http.health_check # for the kubelet: Envoy's own, not the servers'
                    typed_config:
                      "@type": type.googleapis.com/envoy.extensions.filters.http.health_check.v3.HealthCheck
                      pass_through_mode: false
                      headers:
                        - { name: ":path", string_match: { exact: /ready } }
                  {{- with $envoy.callsPerSecondPerAddress }}
                  - name: envoy.filters.http.local_ratelimit
                    typed_config:
                      "@type": type.googleapis.com/envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit
                      stat_prefix: loraplex
                      rate_limited_as_resource_exhausted: true
                      filter_enabled: { default_value: { numerator: 100 } }
                      filter_enforced: { default_value: { numerator: 100 } }
                      token_bucket: { max_tokens: 4294967295, tokens_per_fill: 4294967295, fill_interval: 1s } # of all
                      max_dynamic_descriptors: 65536 # addresses; the one that called longest ago is forgotten
                      descriptors:
                        - entries: [{ key: remote_address }] # a bucket for each
                          token_bucket: { max_tokens: {{ mul 2 . }}, tokens_per_fill: {{ . }}, fill_interval: 1s }
                  {{- end }}
                  {{- if .Values.picker.enabled }}
                  {{- include "loraplex.pickerFilter" . | nindent 18 }}
                  {{- end }}
                  - name: envoy.filters.http.router
                    typed_config:
                      "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
          {{- if $envoy.tlsSecretName }}
          transport_socket:
            name: envoy.transport_sockets.tls
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
              common_tls_context:
                alpn_protocols: {{ ternary "[h2, http/1.1]" "[h2]" (not (empty (include "loraplex.httpBehindEnvoy" .))) }}
                tls_certificates:
                  - certificate_chain: { filename: /etc/envoy/tls/tls.crt }
                    private_key: { filename: /etc/envoy/tls/tls.key }
          {{- end }}
  clusters:
    {{- include "loraplex.replicasCluster" (dict "root" . "name" "replicas" "http" false) | nindent 4 }}
    {{- if include "loraplex.httpBehindEnvoy" . }}
    {{- include "loraplex.replicasCluster" (dict "root" . "name" "replicas-http" "http" true) | nindent 4 }}
    {{- end }}
    {{- if .Values.picker.enabled }}
    {{- include "loraplex.pickerCluster" . | nindent 4 }}
    {{- end }}
{{- end -}}

{{/* The servers as Envoy reaches them, by gRPC or by HTTP: dict "root" $ "name" "replicas" "http" false */}}
{{- define "loraplex.replicasCluster" -}}
{{- $root := .root -}}
{{- $http := .http -}}
{{- $envoy := $root.Values.envoy -}}
- name: {{ .name }}
  type: STRICT_DNS
  dns_refresh_rate: 2s
  respect_dns_ttl: false
  connect_timeout: 2s
  {{- if $root.Values.picker.enabled }}
  {{- include "loraplex.pickerPolicy" $root | nindent 2 }}
  {{- else }}
  lb_policy: RING_HASH
  ring_hash_lb_config: { minimum_ring_size: {{ $envoy.minimumRingSize }} }
  {{- end }}
  common_lb_config:
    healthy_panic_threshold: { value: 0 } # a replica that is known to be away gets nothing
    update_merge_window: 0s # what a health check found holds at once, not after the default second
    {{- if not $root.Values.picker.enabled }}
    consistent_hashing_lb_config: { hash_balance_factor: {{ $envoy.balanceFactor }} }
    {{- end }}
  circuit_breakers:
    thresholds:
      - max_connections: 1024
        max_pending_requests: {{ $envoy.requestsPerReplica }}
        max_requests: {{ mul $envoy.requestsPerReplica (max 1 (len $envoy.endpoints) (int $root.Values.autoscaling.maxReplicas) (int $root.Values.replicas)) }}
        max_retries: 1024
  typed_extension_protocol_options:
    envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
      "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
      explicit_http_config:
        {{- if .http }}
        http_protocol_options: {}
        {{- else }}
        http2_protocol_options:
          connection_keepalive: { interval: 10s, timeout: 5s } # finds replicas that vanished without a word
        {{- end }}
  health_checks:
    - timeout: 2s
      interval: {{ $envoy.healthCheckSeconds }}s
      no_traffic_interval: {{ $envoy.healthCheckSeconds }}s
      unhealthy_threshold: 3 # of time-outs; a draining replica says so, and is believed at once
      healthy_threshold: 1
      {{- if .http }}
      http_health_check: { path: /health, host: {{ include "loraplex.fullname" $root }} }
      {{- else }}
      grpc_health_check: { service_name: readiness }
      transport_socket_match_criteria: { health: true }
      {{- end }}
  transport_socket_matches:
    - name: health # its port is plaintext
      match: { health: true }
      transport_socket:
        name: envoy.transport_sockets.raw_buffer
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer
  {{- if $root.Values.tls.enabled }}
    - name: calls
      match: {}
      transport_socket:
        name: envoy.transport_sockets.tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
          sni: {{ include "loraplex.fullname" $root }}
          common_tls_context:
            {{- if $envoy.tlsSecretName }}
            tls_certificates:
              - certificate_chain: { filename: /etc/envoy/tls/tls.crt }
                private_key: { filename: /etc/envoy/tls/tls.key }
            {{- end }}
            validation_context:
              trusted_ca: { filename: /etc/envoy/upstream/ca.crt }
  {{- end }}
  load_assignment:
    cluster_name: {{ .name }}
    endpoints:
      - lb_endpoints:
          {{- range $envoy.endpoints }}
          - endpoint:
              address:
                socket_address: { address: {{ .host | quote }}, port_value: {{ ternary .httpPort .port $http }} }
              {{- if not $http }}
              health_check_config: { port_value: {{ .healthPort }} }
              {{- end }}
          {{- else }}
          - endpoint:
              address:
                socket_address: { address: {{ printf "%s-replicas.%s.svc" (include "loraplex.fullname" $root) $root.Release.Namespace }}, port_value: {{ ternary $root.Values.http.port $root.Values.ports.data $http }} }
              {{- if not $http }}
              health_check_config: { port_value: {{ $root.Values.ports.health }} }
              {{- end }}
          {{- end }}
{{- end -}}
