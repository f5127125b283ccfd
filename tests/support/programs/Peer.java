// Java's JSSE as a peer; see tests/support/peer_programs.py for what goes in and out.
// Groups are the process's own (-Djdk.tls.namedGroups); jobs are lines "key=value\tkey=value", which need no JSON library.

import java.io.ByteArrayOutputStream;
import java.io.FileInputStream;
import java.io.InputStream;
import java.net.InetAddress;
import java.net.Socket;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.KeyFactory;
import java.security.KeyStore;
import java.security.MessageDigest;
import java.security.PrivateKey;
import java.security.cert.Certificate;
import java.security.cert.CertificateFactory;
import java.security.spec.PKCS8EncodedKeySpec;
import java.util.ArrayList;
import java.util.Base64;
import java.util.HashMap;
import java.util.HexFormat;
import java.util.List;
import java.util.Map;
import java.util.Scanner;
import javax.net.ssl.*;

public class Peer {
    static final char[] NO_PASSWORD = new char[0];

    static List<Certificate> certificates(String path) throws Exception {
        try (InputStream file = new FileInputStream(path)) {
            return new ArrayList<>(CertificateFactory.getInstance("X.509").generateCertificates(file));
        }
    }

    static TrustManager[] trust(String path) throws Exception {
        KeyStore store = KeyStore.getInstance("PKCS12");
        store.load(null, null);
        for (Certificate certificate : certificates(path)) {
            store.setCertificateEntry("ca" + store.size(), certificate);
        }
        TrustManagerFactory factory = TrustManagerFactory.getInstance("PKIX");
        factory.init(store);
        return factory.getTrustManagers();
    }

    static KeyManager[] identity(Map<String, String> job) throws Exception {
        if (job.getOrDefault("certificate", "").isEmpty()) {
            return null;
        }
        List<Certificate> chain = certificates(job.get("certificate"));
        String pem = Files.readString(Path.of(job.get("key"))).replaceAll("-----[^-]+-----|\\s", "");
        PKCS8EncodedKeySpec spec = new PKCS8EncodedKeySpec(Base64.getDecoder().decode(pem));
        PrivateKey key = KeyFactory.getInstance(chain.get(0).getPublicKey().getAlgorithm()).generatePrivate(spec);
        KeyStore store = KeyStore.getInstance("PKCS12");
        store.load(null, null);
        store.setKeyEntry("key", key, NO_PASSWORD, chain.toArray(new Certificate[0]));
        KeyManagerFactory factory = KeyManagerFactory.getInstance("NewSunX509");
        factory.init(store, NO_PASSWORD);
        return factory.getKeyManagers();
    }

    static SSLContext context(Map<String, String> job, String ca) throws Exception {
        SSLContext context = SSLContext.getInstance("TLSv1.3");
        context.init(identity(job), ca.isEmpty() ? null : trust(ca), null);
        return context;
    }

    static String fetch(Map<String, String> job, SSLContext context) throws Exception {
        try (Socket plain = new Socket(InetAddress.getLoopbackAddress(), Integer.parseInt(job.get("port")))) {
            plain.setSoTimeout(20_000);
            SSLSocket socket = (SSLSocket) context.getSocketFactory().createSocket(plain, job.get("name"), plain.getPort(), true);
            SSLParameters parameters = socket.getSSLParameters();
            parameters.setEndpointIdentificationAlgorithm("HTTPS");
            parameters.setProtocols(new String[] {"TLSv1.3"});
            parameters.setCipherSuites(job.get("suites").split(","));
            socket.setSSLParameters(parameters);
            long before = System.currentTimeMillis();
            socket.startHandshake();
            // A session that is older than this handshake was resumed; JSSE does not say so itself.
            boolean resumed = socket.getSession().getCreationTime() < before;
            String request = "GET " + job.get("path") + " HTTP/1.1\r\nHost: " + job.get("name") + "\r\nConnection: close\r\n\r\n";
            socket.getOutputStream().write(request.getBytes(StandardCharsets.US_ASCII));
            ByteArrayOutputStream answer = new ByteArrayOutputStream();
            socket.getInputStream().transferTo(answer);  // SSLException without close_notify
            byte[] bytes = answer.toByteArray();
            int body = new String(bytes, StandardCharsets.ISO_8859_1).indexOf("\r\n\r\n") + 4;
            MessageDigest digest = MessageDigest.getInstance("SHA-256");
            digest.update(bytes, body, bytes.length - body);
            String status = new String(bytes, 9, 3, StandardCharsets.US_ASCII);
            return String.format("{\"error\": \"\", \"suite\": \"%s\", \"status\": %s, \"sha256\": \"%s\", \"resumed\": %b}",
                socket.getSession().getCipherSuite(), status, HexFormat.of().formatHex(digest.digest()), resumed);
        }
    }

    static String client(Map<String, String> job) {
        try {
            SSLContext context = context(job, job.get("ca"));
            String result = fetch(job, context);
            if (!job.getOrDefault("resume", "").isEmpty()) {
                long now = System.currentTimeMillis();  // the session must be older than the second handshake
                while (System.currentTimeMillis() == now) {
                    Thread.onSpinWait();
                }
                result = fetch(job, context);
            }
            return result;
        } catch (Exception error) {
            return "{\"error\": \"" + error.toString().replace('"', '\'').replace('\n', ' ').replace('\\', '/') + "\"}";
        }
    }

    static void serve(SSLServerSocket listener) {
        while (true) {
            try (SSLSocket socket = (SSLSocket) listener.accept()) {
                socket.setSoTimeout(20_000);
                socket.getInputStream().transferTo(socket.getOutputStream());
                socket.shutdownOutput();
            } catch (Exception error) {
                System.err.println(error);
            }
        }
    }

    static int listen(Map<String, String> job) throws Exception {
        String ca = job.getOrDefault("client_ca", "");
        SSLServerSocket listener = (SSLServerSocket) context(job, ca).getServerSocketFactory()
            .createServerSocket(0, 16, InetAddress.getLoopbackAddress());
        listener.setEnabledProtocols(new String[] {"TLSv1.3"});
        listener.setEnabledCipherSuites(job.get("suites").split(","));
        listener.setNeedClientAuth(!ca.isEmpty());
        Thread thread = new Thread(() -> serve(listener));
        thread.setDaemon(true);
        thread.start();
        return listener.getLocalPort();
    }

    public static void main(String[] arguments) throws Exception {
        Scanner input = new Scanner(System.in);
        List<Map<String, String>> jobs = new ArrayList<>();
        for (String line = input.nextLine(); !line.isEmpty(); line = input.nextLine()) {
            Map<String, String> job = new HashMap<>();
            for (String field : line.split("\t")) {
                String[] pair = field.split("=", 2);
                job.put(pair[0], pair[1]);
            }
            jobs.add(job);
        }
        List<String> results = new ArrayList<>();
        for (Map<String, String> job : jobs) {
            results.add(arguments[0].equals("client") ? client(job) : String.valueOf(listen(job)));
        }
        System.out.println("[" + String.join(", ", results) + "]");
        System.out.flush();
        while (arguments[0].equals("server") && input.hasNextLine()) {
            input.nextLine();  // until the test closes standard input
        }
        System.exit(0);
    }
}
