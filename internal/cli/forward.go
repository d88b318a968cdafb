package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/spf13/cobra"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

func (a *app) forwardCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "port-forward VM [LOCAL:]PORT...",
		Short: "Reach TCP ports of a VM on this host's loopback",
		Long: `Listen on ports of this host's loopback, and connect whoever connects there with a TCP port on the
VM's loopback, through its agent: no network is needed. It runs until Ctrl-C. PORT alone is the
same port here, :PORT any free one. The VM may stop and start meanwhile; once it is deleted, the next
connection ends the command.`,
		Example: `  banger vm port-forward calm-otter 3000
  banger vm port-forward calm-otter 8080:80 :5432`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) < 2 {
				return usage(cmd, "%s needs a VM and at least one port, such as 8080:80", cmd.CommandPath())
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			var forwards []forwarding
			for _, arg := range args[1:] {
				f, err := parseForwarding(arg)
				if err != nil {
					return usage(cmd, "%v", err)
				}
				forwards = append(forwards, f)
			}
			return a.forward(cmd.Context(), args[0], forwards)
		},
	}
}

// forwarding is a port here (0: any free one) for a port in the guest.
type forwarding struct{ local, guest int }

func parseForwarding(s string) (forwarding, error) {
	local, guest, two := strings.Cut(s, ":")
	if !two {
		guest = local
	}
	g, err := strconv.Atoi(guest)
	if err != nil || g < 1 || g > 65535 {
		return forwarding{}, fmt.Errorf("%q is no port of a VM: write PORT or LOCAL:PORT, each 1 to 65535", s)
	}
	if two && local == "" {
		return forwarding{0, g}, nil
	}
	l, err := strconv.Atoi(local)
	if err != nil || l < 1 || l > 65535 {
		return forwarding{}, fmt.Errorf("%q is no port here: write PORT or LOCAL:PORT, each 1 to 65535", s)
	}
	return forwarding{l, g}, nil
}

type forwardingView struct {
	Address   string `json:"address"`
	GuestPort int    `json:"guest_port"`
}

func (a *app) forward(ctx context.Context, ref string, forwards []forwarding) error {
	c, err := a.connect()
	if err != nil {
		return err
	}
	v, err := a.running(ctx, c, ref)
	if err != nil {
		return err
	}
	// All or none: a port that is taken must not be found out when half of them work.
	var listeners []net.Listener
	var views []forwardingView
	for _, f := range forwards {
		l, err := net.Listen("tcp4", net.JoinHostPort("127.0.0.1", strconv.Itoa(f.local)))
		if err != nil {
			for _, open := range listeners {
				_ = open.Close()
			}
			return listenFault(err, f)
		}
		listeners = append(listeners, l)
		views = append(views, forwardingView{l.Addr().String(), f.guest})
	}
	if a.json {
		if err := a.printJSON(views); err != nil {
			return err
		}
	} else {
		for _, view := range views {
			fmt.Fprintf(a.stdout, "%s -> %s:%d\n", view.Address, v.GetName(), view.GuestPort)
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var all sync.WaitGroup
	var mu sync.Mutex // of what follows and of stderr
	watch := a.watchPulse(ctx, c, v, "Ctrl-C", func(text string) {
		mu.Lock()
		defer mu.Unlock()
		_, _ = io.WriteString(a.stderr, text)
	})
	defer watch.end()
	var failure, gone error
	for i, l := range listeners {
		port := forwards[i].guest
		all.Go(func() {
			defer cancel() // one that cannot go on ends all: half of them would look like all
			err := c.Forward(ctx, l, v.GetId(), port, func(err error) {
				mu.Lock()
				defer mu.Unlock()
				if fault.Is(err, fault.NotFound) { // nothing comes any more
					gone = fault.New(fault.NotFound, v.GetName(), "was deleted")
					cancel()
					return
				}
				a.printError(named(err, v.GetName()))
			})
			mu.Lock()
			defer mu.Unlock()
			failure = errors.Join(failure, err)
		})
	}
	all.Wait()
	if gone != nil {
		return gone
	}
	return failure
}

func listenFault(err error, f forwarding) error {
	address := fmt.Sprintf("127.0.0.1:%d", f.local)
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return fault.Wrap(err, fault.Busy, address, "the port is taken").WithHint("take any free one: :%d", f.guest)
	case errors.Is(err, syscall.EACCES):
		return fault.Wrap(err, fault.Permission, address, "ports below 1024 are the system's").WithHint("take any free one: :%d", f.guest)
	}
	return fault.Wrap(err, fault.Internal, address, "cannot listen: %v", err)
}
