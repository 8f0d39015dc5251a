// Stream, deadline, retry, cancel, error details: node example.mjs 127.0.0.1:50051 storyteller
import { promisify } from "node:util";
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const [address, model] = process.argv.slice(2);
const here = (path) => fileURLToPath(new URL(path, import.meta.url));
const files = ["loraplex/v1/inference.proto", "google/rpc/status.proto", "google/rpc/error_details.proto"];
const loaded = protoLoader.loadSync(files, {
  includeDirs: [here("../../proto"), here("../googleapis")],
  enums: String,
  longs: Number,
  oneofs: true,
});
const { loraplex } = grpc.loadPackageDefinition(loaded);

// UNAVAILABLE may be tried again, and nothing else. A deadline, in the options of a call, bounds all attempts together.
const retryPolicy = {
  maxAttempts: 3,
  initialBackoff: "0.1s",
  maxBackoff: "2s",
  backoffMultiplier: 2,
  retryableStatusCodes: ["UNAVAILABLE"],
};
const client = new loraplex.v1.InferenceService(address, grpc.credentials.createInsecure(), {
  "grpc.service_config": JSON.stringify({ methodConfig: [{ name: [{}], retryPolicy }] }),
});
const generate = promisify(client.generate.bind(client));
const within = (seconds) => ({ deadline: Date.now() + 1000 * seconds });
const asked = (more) => ({ spec: { model, prompt: { text: "Once upon a time" }, ...more } });

// What the server says of an error: google.rpc.Status in a trailer, with its details packed as Any.
function* details(error) {
  const [packed] = error.metadata.get("grpc-status-details-bin");
  if (!packed) return;
  for (const any of loaded["google.rpc.Status"].deserialize(packed).details) {
    const name = any["@type"] ?? any.type_url;
    const type = loaded[name.split("/").pop()];
    yield [type.type.name, any.value ? type.deserialize(any.value) : any];
  }
}

await promisify(client.waitForReady.bind(client))(Date.now() + 60_000);

console.log("stream:");
for await (const event of client.streamGenerate(asked({ stopping: { maxTokens: 16 } }), within(60))) {
  if (event.delta) process.stdout.write(event.delta.text);
}
console.log();

try {
  await generate(asked({ stopping: { maxTokens: 2000, ignoreEos: true } }), within(0.1));
} catch (error) {
  console.log("deadline:", grpc.status[error.code]);
}

const stream = client.streamGenerate(asked({ stopping: { maxTokens: 1000 } }), within(60));
try {
  for await (const event of stream) if (event.delta) stream.cancel();
} catch (error) {
  console.log("cancel:", grpc.status[error.code]);
}

try {
  await generate(asked({ sampling: { temperature: -1 } }), within(60));
} catch (error) {
  console.log("error:", grpc.status[error.code], error.details);
  for (const [name, detail] of details(error)) console.log(" ", name, JSON.stringify(detail));
}
client.close();
