// Go's crypto/tls as a peer; see tests/support/peer_programs.py for what goes in and out.
package main

import (
	"bufio"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"
)

type Job struct {
	Port        int
	Name        string
	CA          string
	Groups      []string
	Path        string
	Resume      bool
	Certificate string
	Key         string
	ClientCA    string `json:"client_ca"`
}

type Result struct {
	Error   string `json:"error"`
	Suite   string `json:"suite"`
	Group   string `json:"group"`
	Status  int    `json:"status"`
	SHA256  string `json:"sha256"`
	Resumed bool   `json:"resumed"`
}

var groups = map[string]tls.CurveID{
	"x25519": tls.X25519, "secp256r1": tls.CurveP256, "secp384r1": tls.CurveP384, "secp521r1": tls.CurveP521,
	"X25519MLKEM768": tls.X25519MLKEM768,
}

func pool(path string) *x509.CertPool {
	pem, err := os.ReadFile(path)
	if err != nil {
		panic(err)
	}
	certificates := x509.NewCertPool()
	certificates.AppendCertsFromPEM(pem)
	return certificates
}

func configuration(job Job) *tls.Config {
	config := &tls.Config{MinVersion: tls.VersionTLS13}
	for _, group := range job.Groups {
		config.CurvePreferences = append(config.CurvePreferences, groups[group])
	}
	if job.Certificate != "" {
		certificate, err := tls.LoadX509KeyPair(job.Certificate, job.Key)
		if err != nil {
			panic(err)
		}
		config.Certificates = []tls.Certificate{certificate}
	}
	if job.ClientCA != "" {
		config.ClientCAs, config.ClientAuth = pool(job.ClientCA), tls.RequireAndVerifyClientCert
	}
	return config
}

func fetch(job Job, config *tls.Config) (result Result) {
	fail := func(err error) Result { result.Error = err.Error(); return result }
	plain, err := net.DialTimeout("tcp", fmt.Sprintf("127.0.0.1:%d", job.Port), 20*time.Second)
	if err != nil {
		return fail(err)
	}
	defer plain.Close()
	plain.SetDeadline(time.Now().Add(20 * time.Second))
	connection := tls.Client(plain, config)
	if err := connection.Handshake(); err != nil {
		return fail(err)
	}
	fmt.Fprintf(connection, "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", job.Path, job.Name)
	answer, err := io.ReadAll(connection) // io.ErrUnexpectedEOF without close_notify
	if err != nil {
		return fail(err)
	}
	connection.Close()
	head, body, found := strings.Cut(string(answer), "\r\n\r\n")
	if !found {
		return fail(errors.New("no response"))
	}
	fmt.Sscanf(head, "HTTP/1.1 %d", &result.Status)
	sum := sha256.Sum256([]byte(body))
	state := connection.ConnectionState()
	result.SHA256, result.Resumed = hex.EncodeToString(sum[:]), state.DidResume
	result.Suite, result.Group = tls.CipherSuiteName(state.CipherSuite), state.CurveID.String()
	return result
}

func client(job Job) Result {
	config := configuration(job)
	config.RootCAs, config.ServerName = pool(job.CA), job.Name
	config.ClientSessionCache = tls.NewLRUClientSessionCache(8)
	result := fetch(job, config)
	if job.Resume && result.Error == "" {
		result = fetch(job, config)
	}
	return result
}

func serve(listener net.Listener, config *tls.Config) {
	for {
		plain, err := listener.Accept()
		if err != nil {
			return
		}
		go func() {
			defer plain.Close()
			connection := tls.Server(plain, config)
			if _, err := io.Copy(connection, connection); err == nil {
				connection.CloseWrite()
				io.Copy(io.Discard, connection)
			}
		}()
	}
}

func main() {
	input := bufio.NewReader(os.Stdin)
	line, _ := input.ReadBytes('\n')
	var jobs []Job
	if err := json.Unmarshal(line, &jobs); err != nil {
		panic(err)
	}
	if os.Args[1] == "client" {
		results := []Result{}
		for _, job := range jobs {
			results = append(results, client(job))
		}
		json.NewEncoder(os.Stdout).Encode(results)
		return
	}
	ports := []int{}
	for _, job := range jobs {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			panic(err)
		}
		ports = append(ports, listener.Addr().(*net.TCPAddr).Port)
		go serve(listener, configuration(job))
	}
	json.NewEncoder(os.Stdout).Encode(ports)
	io.Copy(io.Discard, input) // until the test closes standard input
}
