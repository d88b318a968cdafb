package usernet

import (
	"io"
	"net"
	"net/netip"
	"testing"
	"time"
)

// BenchmarkThroughput is the rate of one connection from the guest to a server on this host's loopback, both ways, and of
// the same without a network in between. The far end of the wire is another stack in this process: it takes its
// share of the CPU, which a real guest does on its own.
func BenchmarkThroughput(b *testing.B) {
	const chunk = 1 << 20
	sink := func(b *testing.B) uint16 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = l.Close() })
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer conn.Close()
					_, _ = io.Copy(io.Discard, conn)
				}()
			}
		}()
		return l.Addr().(*net.TCPAddr).AddrPort().Port()
	}
	source := func(b *testing.B) uint16 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = l.Close() })
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer conn.Close()
					data := make([]byte, chunk)
					for {
						if _, err := conn.Write(data); err != nil {
							return
						}
					}
				}()
			}
		}()
		return l.Addr().(*net.TCPAddr).AddrPort().Port()
	}
	send := func(b *testing.B, conn net.Conn) {
		data := make([]byte, chunk)
		b.SetBytes(chunk)
		b.ResetTimer()
		for range b.N {
			if _, err := conn.Write(data); err != nil {
				b.Fatal(err)
			}
		}
	}
	receive := func(b *testing.B, conn net.Conn) {
		data := make([]byte, chunk)
		b.SetBytes(chunk)
		b.ResetTimer()
		for range b.N {
			if _, err := io.ReadFull(conn, data); err != nil {
				b.Fatal(err)
			}
		}
	}
	loopbackTo := func(b *testing.B, port uint16) net.Conn {
		conn, err := net.Dial("tcp", netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port).String())
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = conn.Close() })
		return conn
	}
	guestTo := func(b *testing.B, port uint16) net.Conn {
		r := newRig(b, Settings{NAT: true})
		conn, err := r.guest.dial(netip.AddrPortFrom(world4, port))
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = conn.Close() })
		return conn
	}
	b.Run("out/loopback", func(b *testing.B) { send(b, loopbackTo(b, sink(b))) })
	b.Run("out/guest", func(b *testing.B) { send(b, guestTo(b, sink(b))) })
	b.Run("in/loopback", func(b *testing.B) { receive(b, loopbackTo(b, source(b))) })
	b.Run("in/guest", func(b *testing.B) { receive(b, guestTo(b, source(b))) })
}

// BenchmarkConnect is one connection of the guest's, with a word there and back, against the same on the loopback.
func BenchmarkConnect(b *testing.B) {
	port := server(b)
	b.Run("loopback", func(b *testing.B) {
		for range b.N {
			conn, err := net.Dial("tcp", netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port).String())
			if err != nil {
				b.Fatal(err)
			}
			if err := talk(conn, "x"); err != nil {
				b.Fatal(err)
			}
			_ = conn.Close()
		}
	})
	b.Run("guest", func(b *testing.B) {
		r := newRig(b, Settings{NAT: true})
		b.ResetTimer()
		for range b.N {
			conn, err := r.guest.dial(netip.AddrPortFrom(world4, port))
			if err != nil {
				b.Fatal(err)
			}
			_ = conn.SetDeadline(time.Now().Add(patience))
			if err := talk(conn, "x"); err != nil {
				b.Fatal(err)
			}
			_ = conn.Close()
		}
	})
}
