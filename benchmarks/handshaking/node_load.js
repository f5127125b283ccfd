// The generator of benchmarks/serve (generator.c says the protocol) for what needs a newer OpenSSL: modes full and resumed.
// Usage: node node_load.js HOST PORT PATH MODE CONNECTIONS SECONDS RATE BODY_BYTES SUITE GROUP ...
"use strict";
const tls = require("tls");

const [host, port, path, mode, connections, seconds, , bodyBytes, suite, group] = process.argv.slice(2);
const request = `GET ${path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n`;
const found = { requests: 0, bytes: 0, handshakes_full: 0, handshakes_resumed: 0, reconnects: 0, errors: 0, first_error: "" };
const latencies = [];
let end = 0n;

function fail(what) {
  found.errors += 1;
  found.first_error = found.first_error || String(what).replace(/["\\]/g, "'");
}

// One connection after another, each offering the last one's ticket in the mode `resumed`.
function connect(session) {
  const started = process.hrtime.bigint();
  let newest, resumed, failed = false;
  let answer = Buffer.alloc(0);
  const socket = tls.connect({
    host, port: Number(port), servername: "localhost", rejectUnauthorized: false, // the runner has verified the certificate
    minVersion: "TLSv1.3", ciphers: suite, ecdhCurve: group, session,
  });
  socket.on("secureConnect", () => {
    resumed = socket.isSessionReused();
    socket.write(request);
  });
  socket.on("session", (ticket) => { newest = ticket; });
  socket.on("data", (data) => { answer = Buffer.concat([answer, data]); });
  socket.on("error", (error) => { failed = true; fail(error.message); });
  socket.on("close", () => {
    const now = process.hrtime.bigint();
    const body = answer.indexOf("\r\n\r\n") + 4;
    if (!failed && (!answer.toString("latin1").startsWith("HTTP/1.1 200") || answer.length - body !== Number(bodyBytes)))
      fail("response is not what was asked for");
    if (now >= end || found.errors > 100) return;
    found.requests += 1;
    found.bytes += answer.length - body;
    found[resumed ? "handshakes_resumed" : "handshakes_full"] += 1;
    latencies.push(Number((now - started) / 1000n));
    connect(mode === "resumed" ? newest : undefined);
  });
}

process.stdout.write("warm\n");
process.stdin.once("data", () => {
  process.stdin.pause();
  const started = process.hrtime.bigint();
  const before = process.cpuUsage();
  end = started + BigInt(Math.round(Number(seconds) * 1e9));
  for (let i = 0; i < Number(connections); i++) connect();
  setTimeout(() => {
    const used = process.cpuUsage(before);
    latencies.sort((a, b) => a - b);
    const at = (part) => (latencies.length ? latencies[Math.floor((latencies.length - 1) * part)] : 0);
    found.seconds = Number(process.hrtime.bigint() - started) / 1e9;
    found.cpu_seconds = (used.user + used.system) / 1e6;
    found.latency_us = { p50: at(0.5), p90: at(0.9), p99: at(0.99), p999: at(0.999), max: at(1) };
    process.stdout.write(JSON.stringify(found) + "\n", () => process.exit(0));
  }, Number(seconds) * 1000);
});
