package server

import (
	"errors"

	"connectrpc.com/connect"

	bangerv1 "git.thaloco.com/thaloco/banger/api/banger/v1"
	"git.thaloco.com/thaloco/banger/internal/fault"
)

// connectCodes maps every fault code. Connect's own mapping to HTTP statuses follows from it.
var connectCodes = map[fault.Code]connect.Code{
	fault.Invalid:      connect.CodeInvalidArgument,
	fault.NotFound:     connect.CodeNotFound,
	fault.Exists:       connect.CodeAlreadyExists,
	fault.Ambiguous:    connect.CodeInvalidArgument,
	fault.Precondition: connect.CodeFailedPrecondition,
	fault.Busy:         connect.CodeAborted,
	fault.Exhausted:    connect.CodeResourceExhausted,
	fault.Permission:   connect.CodePermissionDenied,
	fault.Unavailable:  connect.CodeUnavailable,
	fault.Timeout:      connect.CodeDeadlineExceeded,
	fault.Cancelled:    connect.CodeCanceled,
	fault.Corrupt:      connect.CodeDataLoss,
	fault.Unsupported:  connect.CodeUnimplemented,
	fault.VersionSkew:  connect.CodeFailedPrecondition,
	fault.Failed:       connect.CodeUnknown,
	fault.Internal:     connect.CodeInternal,
}

// toConnect gives err the Connect code of its fault and the fault itself as detail. Errors that are
// Connect's own (a request that is no protobuf, too large) pass as they are.
func toConnect(err error) error {
	if err == nil {
		return nil
	}
	var own *connect.Error
	if errors.As(err, &own) {
		return own
	}
	message := FaultMessage(err)
	code, ok := connectCodes[fault.Code(message.GetCode())]
	if !ok {
		code = connect.CodeInternal
	}
	ce := connect.NewError(code, err)
	// Marshalling a message of plain strings can only fail on invalid UTF-8, and then the error
	// without its detail still says what happened.
	if detail, detailErr := connect.NewErrorDetail(message); detailErr == nil {
		ce.AddDetail(detail)
	}
	return ce
}

// FaultMessage renders err, whatever it is, as the API's Fault. A nil error gives nil.
func FaultMessage(err error) *bangerv1.Fault {
	if err == nil {
		return nil
	}
	var f *fault.Error
	if !errors.As(err, &f) {
		return &bangerv1.Fault{Code: string(fault.CodeOf(err)), Message: err.Error()}
	}
	m := &bangerv1.Fault{Code: string(f.Code), Op: f.Op, Subject: f.Subject, Message: f.Message, Hint: fault.HintOf(err)}
	if f.Cause != nil {
		m.Cause = f.Cause.Error()
	}
	return m
}
