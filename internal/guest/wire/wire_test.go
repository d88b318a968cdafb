package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"testing"
	"testing/iotest"
	"time"
)

const testSecret = "0123456789abcdef"

func TestHeaderRoundTrip(t *testing.T) {
	for _, h := range []Header{{Kind: KindHTTP}, {Kind: KindTCP, Port: 22}, {Kind: KindTCP, Port: 65535, Wait: true}, {Kind: KindTCP, Port: 65535, Address: netip.MustParseAddr("2001:db8:1111:2222:3333:4444:5555:6666")}, {Kind: KindExec}, {Kind: KindCopy}, {Kind: KindPorts}, {Kind: KindCut, Stream: 1<<32 - 1}} {
		r := bytes.NewBufferString(h.String() + "rest")
		got, err := ReadHeader(r)
		if err != nil || got != h || r.String() != "rest" {
			t.Errorf("%q: got %+v, %v, then %q", h, got, err, r)
		}
	}
	for _, bad := range []string{"", "HTTP", "http ", "tcp", "tcp 0 wait", "tcp 65536 wait", "tcp 22", "tcp 22 maybe", "tcp  22 wait", "tcp -1 wait", "tcp 22 wait ::1", "tcp 22 nowait x", "tcp 22 nowait ::1 ", "exec ", "exec 1", "cut", "cut x", "cut 4294967296"} {
		if h, err := ParseHeader(bad); err == nil {
			t.Errorf("%q was read as %+v", bad, h)
		}
	}
	if _, err := ReadHeader(bytes.NewReader(make([]byte, 1<<20))); err == nil {
		t.Error("a header without end was accepted")
	}
}

func TestAnswer(t *testing.T) {
	var b bytes.Buffer
	long := errors.New(string(bytes.Repeat([]byte("no\n"), 2000)))
	if err := errors.Join(WriteAnswer(&b, nil), WriteAnswer(&b, long)); err != nil {
		t.Fatal(err)
	}
	if err := ReadAnswer(&b); err != nil {
		t.Error(err)
	}
	var refused *RefusedError
	if err := ReadAnswer(&b); !errors.As(err, &refused) || b.Len() != 0 {
		t.Errorf("got %v with %d bytes left", err, b.Len())
	}
}

// TestFrameReaderFindsTheFrame puts noise, whole old frames and cut ones before the wanted frame and
// wants exactly it, with what follows left unread.
func TestFrameReaderFindsTheFrame(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	want := sign(testSecret, kindProve, newNonce(), newNonce())
	for range 300 {
		var wire []byte
		for range random.IntN(4) {
			noise := make([]byte, random.IntN(300))
			for i := range noise {
				noise[i] = magic[random.IntN(len(magic))] // as confusing as it gets
			}
			old := sign(testSecret, kindProve, newNonce(), newNonce()).encode()
			wire = append(append(wire, noise...), old[:random.IntN(frameSize+1)]...)
		}
		wire = append(wire, want.encode()...)
		wire = append(wire, "rest"...)
		source := bytes.NewReader(wire)
		var r io.Reader = source
		if random.IntN(2) == 0 {
			r = iotest.OneByteReader(source)
		}
		reader := &frameReader{r: r}
		for {
			f, err := reader.next()
			if err != nil {
				t.Fatalf("the frame was missed: %v", err)
			}
			if f == want {
				reader.take()
				break
			}
			reader.skip()
		}
		if rest, _ := io.ReadAll(source); string(rest) != "rest" {
			t.Fatalf("%q is left, want the rest", rest)
		}
	}
}

// The guest tells its own time from the host's.
func TestHandshakeTellsWhoWasWaitedFor(t *testing.T) {
	const pause = 50 * time.Millisecond
	host, guest := net.Pipe()
	defer host.Close()
	defer guest.Close()
	got := make(chan Opened, 1)
	go func() { o, _ := GuestHandshake(guest, true, testSecret); got <- o }()
	if err := HostHandshake(&lateConn{Conn: host, pause: pause}, true, testSecret, time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	if o := <-got; o.Waited < pause || o.At.IsZero() {
		t.Errorf("waited %v for a host that took %v, opened at %v", o.Waited, pause, o.At)
	}
}

// lateConn takes its time after the first thing that it reads.
type lateConn struct {
	net.Conn
	pause time.Duration
}

func (c *lateConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	time.Sleep(c.pause)
	c.pause = 0
	return n, err
}

func TestHandshakeSecrets(t *testing.T) {
	for _, mux := range []bool{false, true} {
		for _, secrets := range [][2]string{{testSecret, testSecret}, {testSecret, "ffffffffffffffff"}} {
			host, guest := net.Pipe()
			guestErr := make(chan error, 1)
			go func() { _, err := GuestHandshake(guest, mux, secrets[1]); guestErr <- err }()
			err := HostHandshake(host, mux, secrets[0], time.Now().Add(5*time.Second))
			same := secrets[0] == secrets[1]
			if same && err != nil || !same && !errors.Is(err, ErrSecret) {
				t.Errorf("mux %v, secrets %v: host says %v", mux, secrets, err)
			}
			if !same {
				host.Close() // the guest waits for the host's proof
			}
			if err := <-guestErr; (err == nil) != same {
				t.Errorf("mux %v, secrets %v: guest says %v", mux, secrets, err)
			}
			host.Close()
			guest.Close()
		}
	}
}

// TestGuestRefusesHost plays a host that knows the protocol and not the secret.
func TestGuestRefusesHost(t *testing.T) {
	host, guest := net.Pipe()
	defer host.Close()
	refused := make(chan error, 1)
	go func() { _, err := GuestHandshake(guest, true, testSecret); refused <- err }()
	mine := newNonce()
	if _, err := host.Write(frame{kind: kindHello, host: mine}.encode()); err != nil {
		t.Fatal(err)
	}
	answer := make([]byte, frameSize)
	if _, err := io.ReadFull(host, answer); err != nil {
		t.Fatal(err)
	}
	prove := decodeFrame(answer)
	// The guest's own HMAC turned round must not pass: it covers the kind.
	forged := prove
	forged.kind = kindFinish
	if _, err := host.Write(forged.encode()); err != nil {
		t.Fatal(err)
	}
	if err := <-refused; err == nil {
		t.Error("the guest let a stranger in")
	}
}

func muxFrame(kind byte, flags uint16, length uint32, body []byte) []byte {
	b := make([]byte, muxHeaderSize, muxHeaderSize+len(body))
	b[1] = kind
	binary.BigEndian.PutUint16(b[2:], flags)
	binary.BigEndian.PutUint32(b[4:], 1)
	binary.BigEndian.PutUint32(b[8:], length)
	return append(b, body...)
}

func TestGuard(t *testing.T) {
	data := muxFrame(muxData, 2, 5, []byte("\x00\x02\x00\x01x")) // a ping inside data is data
	for _, c := range []struct {
		name string
		wire []byte
		ok   bool
	}{
		{"data", bytes.Repeat(data, 3), true},
		{"window update", muxFrame(1, 0, 1<<31, nil), true},
		{"go away", muxFrame(3, 0, 0, nil), true},
		{"ping", append(data, muxFrame(muxPing, 1, 1, nil)...), false},
		{"stream", muxFrame(1, muxFlagSYN, 0, nil), false},
		{"data opening a stream", muxFrame(muxData, muxFlagSYN, 0, nil), false},
		{"another version", []byte("\x01aaaaaaaaaaa"), false},
	} {
		for _, split := range []int{1, 5, len(c.wire)} {
			var g guardedConn
			var err error
			for rest := c.wire; len(rest) > 0 && err == nil; rest = rest[min(split, len(rest)):] {
				err = g.inspect(rest[:min(split, len(rest))])
			}
			if (err == nil) != c.ok {
				t.Errorf("%s in pieces of %d: %v", c.name, split, err)
			}
		}
	}
}

// feed is a connection that reads given bytes and takes any.
type feed struct {
	net.Conn
	r io.Reader
}

func (f feed) Read(b []byte) (int, error)       { return f.r.Read(b) }
func (f feed) Write(b []byte) (int, error)      { return len(b), nil }
func (f feed) SetDeadline(time.Time) error      { return nil }
func (f feed) SetReadDeadline(time.Time) error  { return nil }
func (f feed) SetWriteDeadline(time.Time) error { return nil }

func seedFrames(f *testing.F) {
	f.Add([]byte{})
	f.Add(frame{kind: kindHello, host: newNonce()}.encode())
	f.Add(append(frame{kind: kindHello}.encode(), sign(testSecret, kindFinish, nonce{}, nonce{}).encode()...))
	f.Add(append([]byte(magic+magic), sign(testSecret, kindProve, nonce{}, nonce{}).encode()...))
}

// FuzzGuestHandshake: no bytes without the secret pass, and none crash the guest.
func FuzzGuestHandshake(f *testing.F) {
	seedFrames(f)
	f.Fuzz(func(t *testing.T, wire []byte) {
		for _, mux := range []bool{false, true} {
			if _, err := GuestHandshake(feed{r: bytes.NewReader(wire)}, mux, testSecret); err == nil {
				t.Error("a recorded or invented session was accepted")
			}
		}
	})
}

// FuzzHostHandshake: the same for the host.
func FuzzHostHandshake(f *testing.F) {
	seedFrames(f)
	f.Fuzz(func(t *testing.T, wire []byte) {
		for _, mux := range []bool{false, true} {
			if HostHandshake(feed{r: bytes.NewReader(wire)}, mux, testSecret, time.Now().Add(time.Second)) == nil {
				t.Error("a recorded or invented session was accepted")
			}
		}
	})
}

// FuzzHeader: what is read can be written, and nothing crashes either end.
func FuzzHeader(f *testing.F) {
	f.Add([]byte("tcp 22 wait\nSSH-2.0"))
	f.Add([]byte("http\n"))
	f.Add([]byte("cut 7\n"))
	f.Add([]byte("err no\n"))
	f.Fuzz(func(t *testing.T, wire []byte) {
		if h, err := ReadHeader(bytes.NewReader(wire)); err == nil {
			if again, err := ReadHeader(bytes.NewBufferString(h.String())); err != nil || again != h {
				t.Errorf("%+v became %+v, %v", h, again, err)
			}
		}
		_ = ReadAnswer(bytes.NewReader(wire))
		var g guardedConn
		_ = g.inspect(wire)
	})
}

// FuzzAnswer: what a guest says instead of "ok" is one line, and is quoted before anybody sees it.
func FuzzAnswer(f *testing.F) {
	for _, s := range []string{"ok\n", "ok\nrest", "err no such port\n", "err \x1b[2J\n", "err", "\n", "err " + string(bytes.Repeat([]byte("x"), 2*maxAnswer)) + "\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		r := bytes.NewReader(data)
		err := ReadAnswer(r)
		if read := len(data) - r.Len(); read > maxAnswer || err == nil && string(data[:read]) != "ok\n" {
			t.Errorf("%d bytes, %v", read, err)
		}
		var refused *RefusedError
		if errors.As(err, &refused) && bytes.ContainsFunc([]byte(refused.Error()), func(r rune) bool { return r < ' ' || r == 0x7f }) {
			t.Errorf("%q", refused)
		}
	})
}

// FuzzGuard: what passes the guard is what an agent may send, however it is cut into pieces.
func FuzzGuard(f *testing.F) {
	f.Add(muxFrame(muxData, 0, 3, []byte("abc")), uint8(1))
	f.Add(muxFrame(muxPing, 1, 0, nil), uint8(5))
	f.Add(append(muxFrame(muxData, 0, 1, []byte("a")), muxFrame(muxData, muxFlagSYN, 0, nil)...), uint8(13))
	f.Fuzz(func(t *testing.T, data []byte, piece uint8) {
		var whole, pieces guardedConn
		wanted := whole.inspect(data)
		var got error
		for rest := data; len(rest) > 0 && got == nil; {
			n := min(int(piece)+1, len(rest))
			got = pieces.inspect(rest[:n])
			rest = rest[n:]
		}
		if (wanted == nil) != (got == nil) {
			t.Errorf("whole: %v, in pieces of %d: %v", wanted, int(piece)+1, got)
		}
	})
}
