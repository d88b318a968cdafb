package wire

import (
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"
)

// The handshake is four frames of one length:
//
//	host  -> guest  hello   host nonce
//	guest -> host   prove   host nonce, guest nonce, HMAC
//	host  -> guest  finish  host nonce, guest nonce, HMAC
//	guest -> host   open    host nonce, guest nonce, HMAC
//
// The HMAC (SHA-256, keyed with the VM's secret) covers the frame's kind and both nonces, so no
// side can be made to sign for the other. On a virtio-serial port bytes of an earlier client may
// come first in either direction, frames among them: a receiver slides over everything that is not
// the frame it waits for, and a frame of an earlier try never fits, since its nonces are old. The
// guest's last frame is what makes repeated hellos harmless: whatever it answered to them lies
// before "open", and after it comes only the session.
const (
	magic     = "\x89bangerA" // not ASCII first, and no yamux frame starts with it (its version is 0)
	nonceSize = 32
	frameSize = len(magic) + 1 + 2*nonceSize + sha256.Size

	kindHello  = 'H'
	kindProve  = 'P'
	kindFinish = 'F'
	kindOpen   = 'O'
)

// Bounds of the handshake.
const (
	handshakeTime = 10 * time.Second // of one handshake, once the peer began it
	helloInterval = time.Second      // after which the host says hello again on a port
	// maxDiscard is what a host skips before it gives a port up. A port holds at most its queue of
	// old bytes (62,609 were seen); a guest that sends more is not resynchronising.
	maxDiscard = 16 << 20
)

var (
	// ErrSecret says that the peer answered this very handshake and does not know the secret.
	ErrSecret = errors.New("the guest did not prove that it knows this VM's secret")
	// errStray: something else than a handshake came on a fresh stream.
	errStray = errors.New("the peer did not begin with a handshake")
)

type nonce [nonceSize]byte

func newNonce() nonce {
	var n nonce
	rand.Read(n[:]) // never fails (crypto/rand)
	return n
}

type frame struct {
	kind        byte
	host, guest nonce
	mac         [sha256.Size]byte
}

func (f frame) encode() []byte {
	b := make([]byte, 0, frameSize)
	b = append(b, magic...)
	b = append(b, f.kind)
	b = append(b, f.host[:]...)
	b = append(b, f.guest[:]...)
	return append(b, f.mac[:]...)
}

func decodeFrame(b []byte) frame {
	var f frame
	b = b[len(magic):]
	f.kind, b = b[0], b[1:]
	b = b[copy(f.host[:], b):]
	b = b[copy(f.guest[:], b):]
	copy(f.mac[:], b)
	return f
}

// isHello wants the unused fields zero: a cut old hello with the new one behind it, read as one
// frame, has the new one's bytes there.
func (f frame) isHello() bool { return f == frame{kind: kindHello, host: f.host} }

func sign(secret string, kind byte, host, guest nonce) frame {
	m := hmac.New(sha256.New, []byte(secret))
	m.Write([]byte("banger agent session 1 "))
	m.Write([]byte{kind})
	m.Write(host[:])
	m.Write(guest[:])
	f := frame{kind: kind, host: host, guest: guest}
	m.Sum(f.mac[:0])
	return f
}

func (f frame) signed(secret string) bool {
	want := sign(secret, f.kind, f.host, f.guest)
	return hmac.Equal(want.mac[:], f.mac[:])
}

// frameReader finds frames among stale bytes. It never reads past the end of a frame that it
// returns: it holds at most one frame's length, and a frame that begins inside what it holds ends
// where the next read ends. What it holds survives a read that timed out.
type frameReader struct {
	r         io.Reader
	buffer    []byte
	discarded int // stale bytes so far
}

// next returns the next thing that looks like a frame. It may be an old one, or an old one's
// beginning with something else's end: the caller checks, and calls skip if it is not for it.
func (r *frameReader) next() (frame, error) {
	for {
		if at := indexMagic(r.buffer); at > 0 {
			r.drop(at)
		}
		if len(r.buffer) == frameSize {
			return decodeFrame(r.buffer), nil
		}
		chunk := make([]byte, frameSize-len(r.buffer))
		n, err := r.r.Read(chunk)
		r.buffer = append(r.buffer, chunk[:n]...)
		if n == 0 && err != nil {
			return frame{}, err
		}
	}
}

// take consumes the frame that next returned.
func (r *frameReader) take() { r.buffer = r.buffer[:0] }

// skip gives up on the frame that next returned. Only its first byte goes: it may be the cut
// beginning of an old frame with the wanted one inside it.
func (r *frameReader) skip() { r.drop(1) }

func (r *frameReader) drop(n int) {
	r.discarded += n
	r.buffer = r.buffer[:copy(r.buffer, r.buffer[n:])]
}

// indexMagic is where the first magic, or at the end of b a beginning of it, stands; len(b) if none.
func indexMagic(b []byte) int {
	if at := bytes.Index(b, []byte(magic)); at >= 0 {
		return at
	}
	for at := max(0, len(b)-len(magic)+1); at < len(b); at++ {
		if bytes.HasPrefix([]byte(magic), b[at:]) {
			return at
		}
	}
	return len(b)
}

// HostHandshake opens a session as the host until deadline. On a port it says hello again every
// second, since the guest may have swallowed it with the end of an older session.
func HostHandshake(conn net.Conn, mux bool, secret string, deadline time.Time) error {
	r := &frameReader{r: conn}
	mine := newNonce()
	hello := frame{kind: kindHello, host: mine}.encode()
	var proved *nonce
	for {
		if proved == nil {
			if err := writeBy(conn, hello, deadline); err != nil {
				return err
			}
		}
		until := deadline
		if mux && proved == nil {
			until = earlier(deadline, time.Now().Add(helloInterval))
		}
		if err := conn.SetReadDeadline(until); err != nil {
			return err
		}
	frames:
		for {
			f, err := r.next()
			switch {
			case errors.Is(err, os.ErrDeadlineExceeded) && until.Before(deadline):
				break frames
			case err != nil:
				return err
			}
			if r.discarded > maxDiscard {
				return fmt.Errorf("%d bytes came, and no handshake among them", r.discarded)
			}
			switch {
			case f.kind == kindProve && f.host == mine && proved == nil:
				if !f.signed(secret) {
					return ErrSecret
				}
				proved = &f.guest
				r.take()
				if err := writeBy(conn, sign(secret, kindFinish, mine, f.guest).encode(), deadline); err != nil {
					return err
				}
				break frames // for the longer read deadline
			case f.kind == kindOpen && f.host == mine && proved != nil && f.guest == *proved && f.signed(secret):
				r.take()
				return conn.SetDeadline(time.Time{})
			case !mux:
				return errStray
			default:
				r.skip()
			}
		}
	}
}

// Opened is how a session came to be, as the guest saw it.
type Opened struct {
	At     time.Time     // when both sides had proved themselves
	Waited time.Duration // before that, for the host: its share of the time that it took
}

// GuestHandshake answers a session as the guest and returns when the host has proved that it knows
// the secret. On a port (mux) it waits as long as it takes for a host to come, on a stream ten
// seconds. A peer that does not know the secret is never told more than a nonce and its HMAC.
func GuestHandshake(conn net.Conn, mux bool, secret string) (Opened, error) {
	if secret == "" {
		return Opened{}, errors.New("no secret was given to this guest")
	}
	if !mux {
		if err := conn.SetDeadline(time.Now().Add(handshakeTime)); err != nil {
			return Opened{}, err
		}
	}
	r := &frameReader{r: conn}
	var answered *frame
	var since time.Time
	for {
		f, err := r.next()
		if err != nil {
			return Opened{}, err
		}
		switch {
		case f.isHello():
			r.take()
			// The same hello again gets the same answer, so that the host's finish fits either.
			if answered == nil || answered.host != f.host {
				prove := sign(secret, kindProve, f.host, newNonce())
				answered = &prove
			}
			if err := writeBy(conn, answered.encode(), time.Now().Add(handshakeTime)); err != nil {
				return Opened{}, err
			}
			since = time.Now()
		case f.kind == kindFinish && answered != nil && f.host == answered.host && f.guest == answered.guest:
			if !f.signed(secret) {
				return Opened{}, errors.New("the host did not prove that it knows this VM's secret")
			}
			r.take()
			opened := Opened{At: time.Now()}
			opened.Waited = opened.At.Sub(since)
			if err := writeBy(conn, sign(secret, kindOpen, f.host, f.guest).encode(), time.Now().Add(handshakeTime)); err != nil {
				return Opened{}, err
			}
			return opened, conn.SetDeadline(time.Time{})
		case !mux:
			return Opened{}, errStray
		default:
			r.skip()
		}
	}
}

func writeBy(conn net.Conn, b []byte, deadline time.Time) error {
	if err := conn.SetWriteDeadline(deadline); err != nil {
		return err
	}
	_, err := conn.Write(b)
	return err
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}
