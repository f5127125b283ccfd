// Deno (rustls) as a peer; see tests/support/peer_programs.py for what goes in and out.
const text = path => Deno.readTextFileSync(path);

async function readAll(connection) {
  const pieces = [];
  for await (const piece of connection.readable) pieces.push(piece);  // an error without close_notify
  return new Uint8Array(await new Blob(pieces).arrayBuffer());
}

async function fetchOne(job) {
  const options = {hostname: job.name, caCerts: [text(job.ca)], alpnProtocols: ['http/1.1']};
  if (job.certificate) Object.assign(options, {cert: text(job.certificate), key: text(job.key)});
  const connection = await connectTls(job.port, options);
  await connection.write(new TextEncoder().encode(`GET ${job.path} HTTP/1.1\r\nHost: ${job.name}\r\nConnection: close\r\n\r\n`));
  const answer = await readAll(connection);
  const latin1 = new TextDecoder('latin1').decode(answer);
  const body = latin1.indexOf('\r\n\r\n') + 4;
  const digest = new Uint8Array(await crypto.subtle.digest('SHA-256', answer.subarray(body)));
  return {error: '', status: +latin1.slice(9, 12), sha256: [...digest].map(byte => byte.toString(16).padStart(2, '0')).join('')};
}

// connectTls takes client certificates and resolves its host name; startTls takes any name.
async function connectTls(port, options) {
  if (options.cert) return await Deno.connectTls({...options, hostname: '127.0.0.1', port});
  return await Deno.startTls(await Deno.connect({hostname: '127.0.0.1', port}), options);
}

async function client(job) {
  try {
    return await fetchOne(job);
  } catch (error) {
    return {error: String(error)};
  }
}

function listen(job) {
  const listener = Deno.listenTls({hostname: '127.0.0.1', port: 0, cert: text(job.certificate), key: text(job.key)});
  (async () => {
    for await (const connection of listener) connection.readable.pipeTo(connection.writable).catch(error => console.error(String(error)));
  })();
  return listener.addr.port;
}

const reader = Deno.stdin.readable.pipeThrough(new TextDecoderStream()).getReader();
let input = '';
while (!input.includes('\n')) input += (await reader.read()).value;
const results = [];
for (const job of JSON.parse(input)) results.push(await (Deno.args[0] === 'client' ? client : listen)(job));
console.log(JSON.stringify(results));
if (Deno.args[0] === 'server') while (!(await reader.read()).done);
Deno.exit(0);
