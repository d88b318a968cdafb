package hostnet

import (
	"context"
	"errors"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Watch calls changed whenever anybody has changed the firewall, us included, until ctx ends. Many changes
// may come as one. The kernel tells it to root alone.
func (h *Host) Watch(ctx context.Context, changed func()) error {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err == nil {
		defer c.Close()
		err = c.JoinGroup(unix.NFNLGRP_NFTABLES)
	}
	if err != nil {
		return failed(err, "nftables", "the firewall cannot be watched")
	}
	stop := context.AfterFunc(ctx, func() { _ = c.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	for {
		_, err := c.Receive()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil && !errors.Is(err, unix.ENOBUFS) { // of which some were lost, there were too many
			return failed(err, "nftables", "the firewall cannot be watched any more")
		}
		changed()
	}
}
