package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"sync"
	"time"
)

// certificate is signed by itself, as those of development servers are.
var certificate = sync.OnceValues(func() (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	form := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"fake"}}
	der, err := x509.CreateCertificate(rand.Reader, form, form, &key.PublicKey, key)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
})

// serveWeb answers one connection with a page whose title would change a terminal, or, by TLS, with a
// redirect.
func serveWeb(conn net.Conn, secure bool) {
	if secure {
		cert, err := certificate()
		if err != nil {
			_ = conn.Close()
			return
		}
		conn = tls.Server(conn, &tls.Config{Certificates: []tls.Certificate{cert}})
	}
	server := &http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if secure {
			http.Redirect(w, r, "/login", http.StatusFound)
			return
		}
		fmt.Fprint(w, "<html><head><TITLE>Otters &amp;\n\x1b[31m friends\x1b]0;evil\x07</TITLE></head></html>")
	})}
	_ = server.Serve(&once{conn: conn}) // ends with the listener
}

// once is a listener with one connection.
type once struct {
	conn net.Conn
	done bool
}

func (l *once) Accept() (net.Conn, error) {
	if l.done {
		return nil, net.ErrClosed
	}
	l.done = true
	return l.conn, nil
}
func (l *once) Close() error   { return nil }
func (l *once) Addr() net.Addr { return &net.UnixAddr{Name: "fake"} }
