package helper

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"

	"git.thaloco.com/thaloco/banger/internal/fault"
	"git.thaloco.com/thaloco/banger/internal/helper/record"
	"git.thaloco.com/thaloco/banger/internal/helper/wire"
)

// bridgeOf is the caller's record of the network that a request names, which must be there.
func (s *Server) bridgeOf(r wire.Request) (*record.Record, error) {
	if err := s.checkNetwork(r.Network); err != nil {
		return nil, err
	}
	mine, err := s.own(r.Network.Installation)
	if err == nil && mine == nil {
		err = fault.New(fault.Precondition, r.Network.Bridge, "there is no bridge of this installation").WithOp("root helper")
	}
	return mine, err
}

// listenDNS opens port 53 of one of the caller's bridge's addresses, which no user may, for its daemon to
// answer guests there.
func (s *Server) listenDNS(ctx context.Context, r wire.Request) (files []*os.File, err error) {
	release, err := s.turn(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	mine, err := s.bridgeOf(r)
	if err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(mine.Addresses, func(p netip.Prefix) bool { return p.Addr() == r.At }) {
		return nil, invalid("%s is not the bridge's", r.At)
	}
	tcp, udp, err := s.o.ListenDNS(r.At)
	if err != nil {
		return nil, err
	}
	defer tcp.Close()
	defer udp.Close()
	for _, socket := range []any{tcp, udp} {
		f, err := socket.(interface{ File() (*os.File, error) }).File() // as TCP listeners and UDP sockets have it
		if err != nil {
			closeAll(files)
			return nil, fault.Wrap(err, fault.Internal, r.At.String(), "its socket cannot be handed on")
		}
		files = append(files, f)
	}
	return files, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}

// keepNames has the host's resolver told, by way of the caller's bridge, who answers for .vm. It is a server on this
// host: names are nobody else's to know.
func (s *Server) keepNames(ctx context.Context, r wire.Request) error {
	mine, err := s.bridgeOf(r)
	if err != nil {
		return err
	}
	if !r.Server.Addr().IsLoopback() || r.Server.Addr().Zone() != "" || r.Server.Port() == 0 {
		return invalid("%s is no server on this host's loopback", r.Server)
	}
	link, err := net.InterfaceByName(mine.Bridge)
	if err != nil {
		return fault.Wrap(err, fault.Precondition, mine.Bridge, "the bridge is not there").WithOp("root helper")
	}
	return s.o.KeepNames(ctx, link.Index, r.Server)
}

// ListenDNS opens port 53 of an address of the bridge.
func (c *Client) ListenDNS(ctx context.Context, at netip.Addr) (tcp net.Listener, udp net.PacketConn, err error) {
	r := c.request(wire.ListenDNS)
	r.At = at
	_, files, err := wire.CallFiles(ctx, c.socket, r, nil, 2)
	if err != nil {
		return nil, nil, err
	}
	defer closeAll(files) // what is made of them is a copy
	tcp, tcpErr := net.FileListener(files[0])
	udp, udpErr := net.FilePacketConn(files[1])
	if err := errors.Join(tcpErr, udpErr); err != nil {
		if tcp != nil {
			_ = tcp.Close()
		}
		if udp != nil {
			_ = udp.Close()
		}
		return nil, nil, fault.Wrap(fmt.Errorf("descriptors: %w", err), fault.Internal, "root helper", "what it opened at %s cannot be used", at)
	}
	return tcp, udp, nil
}

// KeepNames has the host's resolver ask at addr for names under .vm until ctx ends, or returns why it does not.
func (c *Client) KeepNames(ctx context.Context, addr netip.AddrPort) error {
	r := c.request(wire.KeepNames)
	r.Server = addr
	none := func() {}
	return c.keep(ctx, r, none, none)
}
