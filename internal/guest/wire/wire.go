// Package wire owns what the two ends of an agent session share: the handshake, the multiplexing of a port, and the streams' headers.
//
// A session is opened with the VM's own secret, in both directions (handshake.go). On a link with
// Mux it then carries yamux streams; otherwise each stream is a connection with a handshake of its
// own. Each stream starts with one line (header.go) and is then HTTP or what the header names.
//
// The package dials nothing and never trusts the peer: lengths, times and streams are bounded on both ends.
// internal/guest/agent is the host's end, internal/guest/agentd the guest's, which links no more than it must: what
// it is made of lies in every guest's memory.
package wire

import (
	"bytes"
	"io"
	"net"
	"time"

	"github.com/hashicorp/yamux"
)

// MaxMessage bounds one API message in bytes, in both directions.
const MaxMessage = 1 << 20

// MaxStreams bounds the streams that one guest serves at a time.
const MaxStreams = 256

// MaxForwards bounds those of them that are forwarded connections: a browser's must not keep a guest from being asked to power off.
const MaxForwards = MaxStreams - 32

// writeTime bounds one write to a port. Nothing is wrong with a guest that takes a while (it may
// be emulated on a busy host); one that takes this long reads no more, and its session ends.
const writeTime = time.Minute

// muxConfig is the same on both ends. No keepalive: a paused VM is a healthy one. No close
// timeout: it would cut a half-closed stream that still carries data; see cut in header.go.
func muxConfig() *yamux.Config {
	c := yamux.DefaultConfig()
	c.EnableKeepAlive = false
	c.ConnectionWriteTimeout = writeTime
	c.StreamOpenTimeout = 0 // OpenStream returns at once; the header exchange has the bound
	c.StreamCloseTimeout = 0
	c.AcceptBacklog = MaxStreams
	c.LogOutput = io.Discard // what goes wrong comes back as an error
	return c
}

// ServeMux starts the guest's end of the streams on a port, after GuestHandshake.
func ServeMux(conn net.Conn) (*yamux.Session, error) {
	return yamux.Server(&boundedConn{Conn: conn}, muxConfig())
}

// DialMux starts the host's end of the streams on a port, after HostHandshake. A guest that sends what no agent sends
// ends the session.
func DialMux(conn net.Conn) (*yamux.Session, error) {
	return yamux.Client(&guardedConn{boundedConn: boundedConn{conn}}, muxConfig())
}

// Break ends whatever session the host believes to have on a port that the guest opens again. A
// port does not tell the host that its guest end was closed: without this a host would go on
// waiting for an agent that was killed. The bytes fill what may be missing of a yamux frame (at
// most a stream's window) and are then no frame; a host in a handshake skips them.
func Break(conn net.Conn) error {
	const window = 256 << 10
	return writeBy(conn, bytes.Repeat([]byte{0xff}, window+muxHeaderSize), time.Now().Add(handshakeTime))
}

// boundedConn gives each write a deadline of its own.
type boundedConn struct{ net.Conn }

func (c *boundedConn) Write(b []byte) (int, error) {
	if err := c.SetWriteDeadline(time.Now().Add(writeTime)); err != nil {
		return 0, err
	}
	return c.Conn.Write(b)
}
