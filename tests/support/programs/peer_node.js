// Node.js (OpenSSL 3.5) as a peer; see tests/support/peer_programs.py for what goes in and out.
const crypto = require('crypto'), fs = require('fs'), net = require('net'), tls = require('tls');

const GROUPS = {x25519: 'X25519', secp256r1: 'P-256', secp384r1: 'P-384', secp521r1: 'P-521', X25519MLKEM768: 'X25519MLKEM768'};

function options(job) {
  const result = {minVersion: 'TLSv1.3', ciphers: job.suites.join(':'), ecdhCurve: job.groups.map(group => GROUPS[group]).join(':')};
  if (job.certificate) Object.assign(result, {cert: fs.readFileSync(job.certificate), key: fs.readFileSync(job.key)});
  return result;
}

function fetch(job, session) {
  return new Promise(resolve => {
    let kept = null, suite = '', resumed = false, authorized = '';
    const pieces = [];
    const fail = error => resolve({error: String(error)});
    const socket = tls.connect({...options(job), host: '127.0.0.1', port: job.port, servername: job.name, ca: fs.readFileSync(job.ca), session});
    socket.on('secureConnect', () => {
      [suite, resumed, authorized] = [socket.getCipher().standardName, socket.isSessionReused(), socket.authorizationError || ''];
      socket.write(`GET ${job.path} HTTP/1.1\r\nHost: ${job.name}\r\nConnection: close\r\n\r\n`);
    });
    socket.on('session', session => { kept = session; });
    socket.on('data', data => pieces.push(data));
    socket.on('error', fail);
    socket.setTimeout(20000, () => { socket.destroy(); fail('time is up'); });
    socket.on('end', () => {
      const answer = Buffer.concat(pieces), body = answer.indexOf('\r\n\r\n') + 4;
      resolve({
        error: String(authorized), suite, resumed, session: kept, status: +answer.toString('latin1', 9, 12),
        sha256: crypto.createHash('sha256').update(answer.subarray(body)).digest('hex'),
      });
      socket.end();
    });
  });
}

async function client(job) {
  let result = await fetch(job);
  if (job.resume && !result.error) result = await fetch(job, result.session);
  return {...result, session: undefined};
}

function listen(job) {
  const more = job.client_ca ? {requestCert: true, rejectUnauthorized: true, ca: fs.readFileSync(job.client_ca)} : {};
  const server = tls.createServer({...options(job), ...more, allowHalfOpen: true}, socket => socket.pipe(socket));
  server.on('tlsClientError', error => console.error(error));
  return new Promise(resolve => server.listen(0, '127.0.0.1', () => resolve(server.address().port)));
}

const input = require('readline').createInterface({input: process.stdin});
input.once('line', async line => {
  const results = [];
  for (const job of JSON.parse(line)) results.push(await (process.argv[2] === 'client' ? client : listen)(job));
  console.log(JSON.stringify(results));
  if (process.argv[2] === 'client') process.exit(0);
});
input.on('close', () => { if (process.argv[2] === 'server') process.exit(0); });
