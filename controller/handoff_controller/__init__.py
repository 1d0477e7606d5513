"""The controller: records in etcd, one elected leader, the state machine of every migration."""
