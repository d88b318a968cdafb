package dns

import (
	"encoding/binary"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// send sends a packet over both protocols, from a local address if one is given, and returns the answers: "" where there is none. Of UDP
// none is waited for.
func send(t testing.TB, from, at string, packet []byte) (reply []byte) {
	t.Helper()
	local := net.IP(nil)
	if from != "" {
		local = net.ParseIP(from)
	}
	udp, err := (&net.Dialer{LocalAddr: &net.UDPAddr{IP: local}}).Dial("udp", at)
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	_, _ = udp.Write(packet[:min(len(packet), 9000)])
	tcp, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: local}}).Dial("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	packet = packet[:min(len(packet), dns.MaxMsgSize)]
	_, _ = tcp.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(packet))), packet...))
	_ = tcp.(*net.TCPConn).CloseWrite()
	_ = tcp.SetReadDeadline(time.Now().Add(5 * time.Second))
	reply, err = io.ReadAll(tcp)
	if err != nil && isTimeout(err) {
		t.Errorf("the connection stays open after %x", packet)
	}
	return reply[min(2, len(reply)):]
}

// hostile are packets that no resolver sends.
func hostile(t testing.TB, name string) map[string][]byte {
	t.Helper()
	whole, err := query(name, dns.TypeA).Pack()
	if err != nil {
		t.Fatal(err)
	}
	notify := slices.Clone(whole)
	notify[2] |= dns.OpcodeNotify << 3
	return map[string][]byte{
		"nothing":                      {},
		"a query":                      whole,
		"the end is missing":           whole[:len(whole)-3],
		"a header alone":               whole[:12], // it promises a question
		"half a header":                whole[:6],
		"a name that points at itself": append(whole[:12:12], 0xc0, 12, 0, 1, 0, 1),
		"counts of everything":         append(whole[:4:4], 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff),
		"a response":                   append([]byte{0, 0, 0x81, 0x80}, whole[4:]...),
		"a label that does not end":    append(whole[:12:12], []byte("\x3f"+strings.Repeat("a", 300))...),
		"a notification":               notify,
	}
}

// TestHostilePackets: whatever comes, the server goes on. The library takes a header without anything behind it for a message without a
// question, whatever the header promises.
func TestHostilePackets(t *testing.T) {
	s, _ := serve(t)
	for what, packet := range hostile(t, "web.vm.") {
		reply := send(t, "", s.Addr().String(), packet)
		if m := new(dns.Msg); what == "a header alone" && (m.Unpack(reply) != nil || m.Rcode != dns.RcodeFormatError) {
			t.Errorf("%s is answered with %x", what, reply)
		}
		if got := ask(t, s, "udp", query("web.vm.", dns.TypeA)); got != "NOERROR aa; web.vm. 1 IN A 10.9.0.7" {
			t.Errorf("after %s: %s", what, got)
		}
	}
}

// told is a server for guests that all may have others asked, or none; 127.0.9.3 is none of them. wrongly counts what reached the host's
// resolver and was not to.
func told(t testing.TB, forward bool) (at string, wrongly *atomic.Int32) {
	t.Helper()
	wrongly = &atomic.Int32{}
	resolver := start(t, dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		if !forward || len(q.Question) != 1 || under(q.Question[0].Name) {
			wrongly.Add(1)
		}
		_ = w.WriteMsg(new(dns.Msg).SetReply(q))
	}))
	of := func(from netip.Addr) (Guest, bool) {
		return Guest{Forward: forward, Lookup: func(name string) []netip.Addr {
			if name != "web" {
				return nil
			}
			return []netip.Addr{netip.MustParseAddr("10.9.0.7")}
		}}, from != netip.MustParseAddr("127.0.9.3")
	}
	return start(t, NewGuests(of, func() ([]string, error) { return []string{resolver}, nil }, slog.New(slog.DiscardHandler))), wrongly
}

// stillAnswers wants the name of a VM to be answered, and nothing to have reached the host's resolver that was not to.
func stillAnswers(t testing.TB, at, what string, wrongly *atomic.Int32) {
	t.Helper()
	if m, err := guestQuery("127.0.9.2", "udp", at, "web.vm.", dns.TypeA); err != nil || len(m.Answer) != 1 {
		t.Errorf("after %s: %v, %v", what, m, err)
	}
	if n := wrongly.Swap(0); n != 0 {
		t.Errorf("after %s: the host's resolver was asked for what it is not to know", what)
	}
}

// TestHostileGuests is TestHostilePackets with the server that guests ask.
func TestHostileGuests(t *testing.T) {
	for _, forward := range []bool{true, false} {
		at, wrongly := told(t, forward)
		for _, from := range []string{"127.0.9.1", "127.0.9.3"} {
			for _, name := range []string{"web.vm.", "example.com."} {
				for what, packet := range hostile(t, name) {
					send(t, from, at, packet)
					stillAnswers(t, at, what+" of "+from, wrongly)
				}
			}
		}
	}
}

// FuzzGuests sends anything to the server that guests ask, as one that may have others asked, may not, or is not known. Run it as FuzzPacket.
func FuzzGuests(f *testing.F) {
	for _, name := range []string{"web.vm.", "example.com."} {
		for _, packet := range hostile(f, name) {
			for who := range uint8(3) {
				f.Add(who, packet)
			}
		}
	}
	// Of the first of three guests, others are asked; the last one is not known.
	open, openly := told(f, true)
	closed, wrongly := told(f, false)
	f.Fuzz(func(t *testing.T, who uint8, packet []byte) {
		at, wrongly := closed, wrongly
		if who%3 == 0 {
			at, wrongly = open, openly
		}
		reply := send(t, []string{"127.0.9.1", "127.0.9.2", "127.0.9.3"}[who%3], at, packet)
		var m dns.Msg
		if len(reply) > 0 && m.Unpack(reply) == nil && !m.Response {
			t.Errorf("%x is answered with a query: %x", packet, reply)
		}
		stillAnswers(t, at, "what was found", wrongly)
	})
}
